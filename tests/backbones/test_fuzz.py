"""Files spoilt at random: each is refused with a reason or loaded right, and nothing in it runs."""

import io
import pickle
import random
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import assert_equal, state
from safetensors.torch import save
from test_formats import HEAD, WRITERS

from backbones import ConvNeXt, load_pretrained

MINI = dict(depths=(1, 2, 3, 1), channels=(8, 16, 24, 32))


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def pickled(content, rng):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    return file.getvalue()


def truncated(weights, rng, marker):
    data = pickled({'model': weights}, rng)
    return data[: rng.randrange(len(data))]


def flipped(weights, rng, marker):
    """In the pickled part, where a byte means something to the reader."""
    data = bytearray(pickled({'model': weights}, rng))
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(2000)] = rng.randrange(256)
    return bytes(data)


def other_pickle(weights, rng, marker):
    return rng.choice(
        [
            lambda: pickle.dumps(ConvNeXt),
            lambda: pickle.dumps({'model': [1, 2, 3]}),
            lambda: pickle.dumps(Payload(marker)),
            lambda: pickled({'model': weights, 'args': Payload(marker)}, rng),
            lambda: pickled(Payload(marker), rng),
            lambda: pickled([weights], rng),
            lambda: pickled(ConvNeXt(MINI), rng),
            lambda: bytes(rng.randrange(256) for _ in range(500)),
            lambda: b'',
        ]
    )()


def renamed(weights, rng, marker):
    prefix = rng.choice(['model.', 'module.module.', 'net.', 'student.backbone.', 'backbone.backbone.', 'x'])
    return pickled({rng.choice(['model', 'state_dict']): {prefix + key: v for key, v in weights.items()}}, rng)


def some_keys(weights, rng, marker):
    keys = [key for key in weights if rng.random() < 0.8]
    return pickled({'state_dict': {key: weights[key] for key in keys}}, rng)


def swapped(weights, rng, marker):
    """Two tensors of different shapes change places."""
    shapes = {}
    for key, value in weights.items():
        shapes.setdefault(tuple(value.squeeze().shape), []).append(key)
    one, two = (rng.choice(keys) for keys in rng.sample(list(shapes.values()), 2))
    return pickled({'model': {**weights, one: weights[two], two: weights[one]}}, rng)


def averaged(weights, rng, marker):
    """An EMA wrapper, beside the weights or alone."""
    ema = {f'module.{key}': value for key, value in weights.items()}
    beside = {'model': weights} if rng.random() < 0.5 else {}
    return pickled({**beside, rng.choice(['model_ema', 'state_dict_ema', 'ema_state_dict']): ema}, rng)


def wrapped(weights, rng, marker):
    """Right, only packed unusually."""
    for _ in range(rng.randint(0, 2)):
        weights = {f'module.{key}': value for key, value in weights.items()}
    content = rng.choice(
        [weights, {'model': weights}, {'state_dict': weights, 'meta': {}}, {'epoch': 3, 'model': weights}]
    )
    return pickled(content, rng)


def other_values(weights, rng, marker):
    key = rng.choice(list(weights))
    value = rng.choice(
        [None, 3, 'text', weights[key].double(), weights[key][None], torch.ones(3, 5), weights[key].int()]
    )
    return pickled({'model': {**weights, key: value}}, rng)


SPOIL = [truncated, flipped, other_pickle, renamed, some_keys, swapped, averaged, wrapped, other_values]


@pytest.mark.parametrize('seed', range(90))
def test_refused_with_a_reason_or_loaded_right(seed, mini, tmp_path):
    rng = random.Random(seed)
    source, target = mini(), ConvNeXt(MINI)
    weights = WRITERS[rng.choice(list(WRITERS))][0](source)
    marker = tmp_path / 'marker'
    spoil = SPOIL[seed % len(SPOIL)]
    path = tmp_path / 'weights.pth'
    path.write_bytes(spoil(weights, rng, marker))
    before = state(target)
    try:
        report = load_pretrained(target, path)
    except ValueError as error:
        assert 'weights.pth' in str(error)
        assert len(str(error)) < 2000
        assert_equal(target, before, before)
    else:
        norms = [key for key in before if key.startswith('norm')]
        assert set(before) - set(norms) <= set(report.loaded)
        if spoil is not flipped:  # a byte of a value is a value; only a checksum tells
            assert_equal(target, state(source), report.loaded)
    assert not marker.exists()


@pytest.mark.parametrize('seed', range(10))
def test_spoilt_safetensors(seed, mini, tmp_path):
    rng = random.Random(seed)
    weights = {key: value.contiguous() for key, value in state(mini()).items()}
    data = bytearray(save({**weights, **HEAD}))
    if seed % 2:
        data = data[: rng.randrange(len(data))]
    else:
        for _ in range(8):
            data[rng.randrange(4000)] = rng.randrange(256)
    path = tmp_path / 'weights.safetensors'
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'weights\.safetensors'):
        load_pretrained(ConvNeXt(MINI), path)


def test_the_seeds_meet_both_ends(mini, tmp_path):
    """That the test above is no test of refusals alone."""
    outcomes = []
    for seed in range(len(SPOIL)):
        rng = random.Random(seed)
        path = tmp_path / 'weights.pth'
        path.write_bytes(SPOIL[seed](WRITERS['official'][0](mini()), rng, tmp_path / 'marker'))
        try:
            load_pretrained(ConvNeXt(MINI), path)
            outcomes.append('loaded')
        except ValueError:
            outcomes.append('refused')
    assert set(outcomes) == {'loaded', 'refused'}
