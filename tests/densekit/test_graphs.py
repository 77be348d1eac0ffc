"""Backbone and neck as CUDA graphs: which graph runs when, with a stand-in on the CPU that has a graph's dangers."""

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from backbones import ConvNeXt
from densekit.engine import graphs
from densekit.engine.compiled import CompilePlan, carry_out
from densekit.engine.graphs import check_capturable, use_graphs

SIZES = [(2, 3, 32, 32), (2, 3, 32, 48)]


class Neck(nn.Module):
    """With running statistics."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(c, 4, 1) for c in (8, 12)])
        self.norm = nn.BatchNorm2d(4)

    def forward(self, features):
        return tuple(self.norm(conv(x)) for conv, x in zip(self.convs, features, strict=True))


class Model(nn.Module):
    def __init__(self, drop_path=0.4, **options):
        super().__init__()
        arch = dict(depths=(1, 2, 1, 1), channels=(8, 12, 16, 16))
        self.backbone = ConvNeXt(
            arch=arch, out_indices=(0, 1), drop_path_rate=drop_path, layer_scale_init_value=1.0, **options
        )
        self.neck = Neck()
        self.with_neck = True

    def extract_feat(self, images):
        return self.neck(self.backbone(images))


class Recorder:
    """Records as a CUDA graph does: results and gradients in the same memory each time, activations in one place.

    Warming up draws random numbers and updates statistics.
    """

    def __init__(self):
        self.recorded = 0
        self.pool = None

    def __call__(self, function, arguments):
        self.recorded += 1
        outputs = [function(*arguments) for _ in range(3)][-1]
        results = [torch.zeros_like(output) for output in outputs]
        images, *weights = arguments
        gradients = [torch.zeros_like(weight) for weight in weights]
        there = [weight.data_ptr() for weight in weights]
        recorder = self

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(_ctx, given, *aliases):
                assert given.shape == images.shape
                assert there == [alias.data_ptr() for alias in aliases] == [weight.data_ptr() for weight in weights]
                images.copy_(given)
                with torch.enable_grad():
                    recorder.pool = function(images)
                for result, output in zip(results, recorder.pool, strict=True):
                    result.copy_(output.detach())
                return tuple(result.detach() for result in results)

            @staticmethod
            def backward(_ctx, *upstream):
                found = torch.autograd.grad(recorder.pool, weights, upstream, allow_unused=True, retain_graph=True)
                for gradient, new in zip(gradients, found, strict=True):
                    gradient.copy_(new)
                return (None, *(gradient.detach() for gradient in gradients))

        return Replay.apply


def graphed(model, max_shapes=8):
    """The model's copy on recordings, and what records."""
    ours, recorder = copy.deepcopy(model), Recorder()
    use_graphs(ours, max_shapes, recorder)
    return ours, recorder


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def images(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def loss_of(model, size, seed=0):
    torch.manual_seed(seed)
    features = model.extract_feat(images(size, seed).to(next(model.parameters()).device))
    return sum((feature * torch.arange(feature.shape[-1]).to(feature)).square().mean() for feature in features)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(ours, theirs, rtol=0.0):
    assert any(one is not None and bool(one.any()) for one in ours)
    assert [one is None for one in ours] == [one is None for one in theirs]
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=True) if one is not None]
    return all((one - other).abs().max() <= rtol * other.abs().max() for one, other in pairs)


def train(model, steps, lr=0.1):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for step in range(steps):
        loss = loss_of(model, SIZES[step % 2], step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_is_the_same_to_the_bit(model):
    """Drop path, running statistics and random numbers behind the first steps, in which there is recording."""
    ours, recorder = graphed(model)
    assert train(ours, 6) == train(model, 6)
    assert recorder.recorded == 2
    assert same(list(ours.state_dict().values()), list(model.state_dict().values()))
    assert list(ours.state_dict()) == list(model.state_dict())


def accumulated(model):
    for seed in range(3):
        loss_of(model, SIZES[0], seed).backward()
    return gradients(model)


def test_gradients_accumulate(model):
    ours, _ = graphed(model)
    assert same(accumulated(ours), accumulated(model))


def test_without_copies_they_would_not(model, monkeypatch):
    ours, _ = graphed(model)
    monkeypatch.setattr(graphs._CopiedGradients, 'backward', staticmethod(lambda _ctx, *gradients: gradients))
    assert not same(accumulated(ours), accumulated(model))


def two_at_once(model):
    (loss_of(model, SIZES[0], 1) + 2 * loss_of(model, SIZES[1], 2)).backward()
    return gradients(model)


def test_two_forward_passes_before_a_backward_pass(model):
    ours, recorder = graphed(model)
    assert same(two_at_once(ours), two_at_once(model), rtol=1e-5)  # added up in another order
    assert recorder.recorded == 1
    ours.zero_grad()
    loss_of(ours, SIZES[1]).backward()  # once it is over, recordings are used again
    assert recorder.recorded == 2


def test_one_pool_would_not_hold_both(model, monkeypatch):
    ours, _ = graphed(model)
    monkeypatch.setattr(graphs.GraphedFeatures, '_reason_against', lambda self, images: None)
    (loss_of(ours, SIZES[0], 1) + 2 * loss_of(ours, SIZES[0], 2)).backward()
    (loss_of(model, SIZES[0], 1) + 2 * loss_of(model, SIZES[0], 2)).backward()
    assert not same(gradients(ours), gradients(model), rtol=1e-2)


def test_a_pass_that_came_to_nothing_is_waited_for_no_longer(model):
    ours, recorder = graphed(model)
    loss = loss_of(ours, SIZES[0])
    del loss
    loss_of(ours, SIZES[1])
    assert recorder.recorded == 2


def test_features_stay_what_they_were(model):
    ours, _ = graphed(model)
    kept = ours.extract_feat(images(SIZES[0]))
    sum(feature.sum() for feature in kept).backward()
    before = [feature.detach().clone() for feature in kept]
    loss_of(ours, SIZES[0], 1).backward()
    assert all(torch.equal(one, other) for one, other in zip(kept, before, strict=True))


def test_a_second_backward_pass_is_refused(model):
    ours, _ = graphed(model)
    loss = loss_of(ours, SIZES[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='second backward pass'):
        loss.backward()


def test_beyond_the_limit_it_runs_as_it_is(model, monkeypatch):
    said = []
    monkeypatch.setattr(graphs, 'print_log', lambda line, **_: said.append(line))
    ours, recorder = graphed(model, max_shapes=1)
    assert train(ours, 6) == train(model, 6)
    assert recorder.recorded == 1
    _, beyond = said
    assert '(2, 3, 32, 48)' in beyond and 'compile.graphs allows 1' in beyond and 'pad_size_divisor' in beyond


def test_validation_is_left_alone(model):
    ours, recorder = graphed(model)
    with torch.no_grad():
        ours.extract_feat(images(SIZES[0]))
    ours.eval()
    ours.extract_feat(images(SIZES[0]))
    assert recorder.recorded == 0


def moved(model):
    model.backbone.norm0.weight.data = model.backbone.norm0.weight.data.clone() + 1


def frozen(model):
    model.neck.norm.weight.requires_grad_(False)


def in_evaluation_mode(model):
    model.neck.norm.eval()


@pytest.mark.parametrize('change', [moved, frozen, in_evaluation_mode])
def test_what_changes_is_recorded_anew(model, change):
    ours, recorder = graphed(model)
    for one in (ours, model):
        loss_of(one, SIZES[0]).backward()
        one.zero_grad()
        change(one)
        loss_of(one, SIZES[0], 1).backward()
    assert recorder.recorded == 2
    assert same(gradients(ours), gradients(model))


def test_a_recording_that_is_stale_would_fail(model, monkeypatch):
    ours, _ = graphed(model)
    loss_of(ours, SIZES[0]).backward()
    moved(ours)
    feature = ours.extract_feat
    monkeypatch.setattr(feature, '_recording_for', lambda images: next(iter(feature.graphs.values())))
    with pytest.raises(AssertionError):
        loss_of(ours, SIZES[0])


def test_weights_that_are_loaded_in_place_need_no_new_recording(model):
    torch.manual_seed(1)
    other = Model()
    ours, recorder = graphed(model)
    loss_of(ours, SIZES[0]).backward()
    ours.zero_grad()
    ours.load_state_dict(other.state_dict())
    loss_of(ours, SIZES[0], 1).backward()
    loss_of(other, SIZES[0], 1).backward()
    assert recorder.recorded == 1
    assert same(gradients(ours), gradients(other))


def test_a_hook_that_comes_later_is_called(model, monkeypatch):
    said, calls = [], []
    ours, recorder = graphed(model)
    monkeypatch.setattr(graphs, 'print_log', lambda line, **_: said.append(line))
    loss_of(ours, SIZES[0]).backward()
    handle = ours.backbone.stages[0][0].register_forward_hook(lambda *_: calls.append(1))
    loss_of(ours, SIZES[0]).backward()
    assert calls == [1] and 'has a hook' in said[0]
    handle.remove()
    loss_of(ours, SIZES[0]).backward()
    assert calls == [1] and recorder.recorded == 1


def test_a_copy_has_weights_of_its_own(model):
    ours, recorder = graphed(model)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.neck.norm.weight.mul_(2)
    loss_of(twin, SIZES[0]).backward()
    assert recorder.recorded == 0
    assert ours.neck.norm.weight.grad is None and twin.neck.norm.weight.grad is not None


class Embedding(Model):
    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.ones(4, 1, 1))

    def extract_feat(self, images):
        return tuple(x + self.level for x in super().extract_feat(images))


def test_weights_elsewhere_are_refused():
    ours, _ = graphed(Embedding())
    with pytest.raises(RuntimeError, match='uses more than backbone and neck'):
        loss_of(ours, SIZES[0])


def test_what_is_unused_gets_no_gradient():
    class Idle(Model):
        def extract_feat(self, images):
            return self.backbone(images)

    model = Idle()
    ours, _ = graphed(model)
    for one in (ours, model):
        loss_of(one, SIZES[0]).backward()
    assert same(gradients(ours), gradients(model))
    assert ours.neck.norm.weight.grad is None


def test_autocast(model):
    """Another precision is another recording; what autocast has kept of weights is not in it."""
    ours, recorder = graphed(model)
    for one in (ours, model):
        for seed in range(2):
            one.zero_grad()
            with torch.autocast('cpu', torch.bfloat16):
                loss = loss_of(one, SIZES[0], seed)
            loss.backward()
            torch.optim.SGD(one.parameters(), 0.1).step()
    assert recorder.recorded == 1
    assert same(gradients(ours), gradients(model))
    loss_of(ours, SIZES[0])
    assert recorder.recorded == 2


class StandIn(contextlib.nullcontext):
    """In the place of what PyTorch records with; keeps what it is given."""

    made: list[dict] = []

    def __init__(self, *_, **options):
        super().__init__()
        self.made.append(options)


def test_recording_leaves_other_threads_alone(model, monkeypatch):
    """PyTorch's own function, with stand-ins for all that needs a GPU."""
    monkeypatch.setattr(StandIn, 'made', [])
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: 'pool')
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    for name in ('CUDAGraph', 'Stream', 'stream'):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, 'graph', StandIn)
    use_graphs(model, 1)
    model.extract_feat._recording_for(images(SIZES[0]))
    assert StandIn.made == 2 * [{'pool': 'pool', 'capture_error_mode': 'thread_local'}]  # forward and backward
    assert torch.cuda.graph is StandIn


def with_hook(model):
    model.backbone.stages[0][0].register_forward_hook(lambda *_: None)


def with_hook_of_a_weight(model):
    model.neck.norm.weight.register_hook(lambda gradient: gradient)


def without_features(model):
    del model.backbone


def with_sync_bn(model):
    model.neck.norm = nn.SyncBatchNorm(4)


@pytest.mark.parametrize(
    ('options', 'change', 'processes', 'said'),
    [
        ({}, lambda model: None, 1, 'need a CUDA GPU, and the model is on the CPU'),
        ({}, lambda model: None, 4, 'one process so far, and there are 4'),
        ({}, with_hook, 1, r'backbone.stages.0.0 \(ConvNeXtBlock\) has a hook'),
        ({}, with_hook_of_a_weight, 1, r'neck.norm \(BatchNorm2d\) has a hook'),
        ({}, with_sync_bn, 1, 'neck.norm .* synchronizes'),
        ({'with_cp': True}, lambda model: None, 1, 'with_cp'),
        ({}, without_features, 1, 'has no backbone and extract_feat'),
    ],
)
def test_what_cannot_be_is_refused(options, change, processes, said):
    model = Model(**options)
    change(model)
    with pytest.raises(ValueError, match=f'compile.graphs: .*{said}.* Train without compile.graphs'):
        check_capturable(model, processes=processes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('drop_path', [0.0, 0.4])
@pytest.mark.parametrize('kernels', ['eager', 'triton'])
def test_real_graphs_are_the_same_to_the_bit(kernels, drop_path, bf16, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    torch.manual_seed(0)
    model = Model(drop_path, kernels=kernels).cuda()
    ours = copy.deepcopy(model)
    check_capturable(ours, processes=1)
    carry_out(CompilePlan((), None, graphs=2), ours)
    with torch.autocast('cuda', torch.bfloat16, enabled=bf16):
        assert train(ours, 20) == train(model, 20)
    assert len(ours.extract_feat.graphs) == 2
    assert same(list(ours.state_dict().values()), list(model.state_dict().values()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('run', [accumulated, two_at_once])
def test_real_graphs_do_not_write_over_what_is_in_use(model, run, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    model = model.cuda()
    ours = copy.deepcopy(model)
    use_graphs(ours, 2)
    assert same(run(ours), run(model), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_real_graphs_share_their_memory(model):
    """Eight sizes, the largest first, take little more than the first."""
    model = model.cuda()
    use_graphs(model, 8)
    held = []
    for side in range(512, 0, -64):
        loss_of(model, (2, 3, side, 512)).backward()
        model.zero_grad()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] < 2 * held[0]


class Noise:
    """A data set."""

    def __len__(self):
        return 100000

    def __getitem__(self, index):
        return torch.full((3, 64, 64 + index % 7), float(index))  # of many sizes, for which memory is pinned anew


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_real_graphs_beside_a_loader_that_pins(model):
    loader = DataLoader(Noise(), batch_size=None, num_workers=1, pin_memory=True)
    enough, pinned = threading.Event(), []

    def load():
        for batch in loader:
            pinned.append(batch.is_pinned())
            if enough.is_set():
                return

    thread = threading.Thread(target=load)
    thread.start()
    try:
        model = model.cuda()
        use_graphs(model, 16)
        for i in range(16):
            loss_of(model, (2, 3, 32, 32 + 16 * i)).backward()
            model.zero_grad()
    finally:
        enough.set()
        thread.join()
    assert len(model.extract_feat.graphs) == 16
    assert pinned and all(pinned)
