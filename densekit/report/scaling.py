"""What training on many GPUs needs, calculated: memory, bytes sent and time. Nothing here is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from densekit.engine.config import load_config
from densekit.engine.sharding import blocks_of
from densekit.report.analysis import count
from densekit.report.image_size import training_size
from densekit.report.memory import activations, gradient_bytes, weight_bytes
from densekit.report.meta import build_on_meta

PRECISIONS = {'float32': torch.float32, 'bf16': torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """What is taken for granted. Sustained speeds: what is reached, not what a data sheet promises.

    Attributes:
        gpus_per_node: so many talk over the link within a node.
        tflops: 10^12 operations per second of a GPU, by precision.
        node_link: 10^9 bytes per second that a GPU sends within its node.
        net_link: the same between nodes.
    """

    gpus_per_node: int = 8
    tflops: Mapping[str, float] = field(default_factory=lambda: {'float32': 40.0, 'bf16': 300.0})
    node_link: float = 300.0
    net_link: float = 40.0


@dataclass(frozen=True)
class Job:
    """A recipe, as far as its scale is concerned.

    Attributes:
        name: of the recipe.
        batch: images per GPU.
        size: height and width of the largest training image, in pixels.
        weights: bytes of parameters and buffers.
        gradients: bytes of the trainable parameters.
        blocks: bytes of the backbone's blocks, which FSDP2 puts together one by one.
        largest_block: bytes.
        activations: bytes kept for the backward pass, by precision.
        multiply_adds: of a forward pass for one image.
    """

    name: str
    batch: int
    size: tuple[int, int]
    weights: int
    gradients: int
    blocks: int
    largest_block: int
    activations: dict[str, int]
    multiply_adds: int

    @property
    def operations(self) -> int:
        """Of a training step of one GPU: forward, and twice as many backward; two for each multiply-add."""
        return 2 * 3 * self.multiply_adds * self.batch


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU."""

    weights: float
    gradients: float
    state: float
    in_flight: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.state + self.in_flight + self.activations


def job_of(config: str) -> Job:
    """Counts what a recipe has, without data or weights.

    Args:
        config: path of the config file.

    Raises:
        ValueError: if its model cannot be counted.
    """
    cfg = load_config(config)
    name, size = Path(config).stem, training_size(cfg.train_dataloader.dataset, cfg.model.get('data_preprocessor'))
    if size is None:
        raise ValueError(f'{config}: the training pipeline does not say how large images are')
    model = build_on_meta(cfg)
    multiply_adds, _, missing = count(model, size)
    if multiply_adds is None:
        raise ValueError(f'{config}: the operations of its model cannot be counted: {missing}')
    model = model.to_empty(device='cpu')  # address space alone: autocast knows no meta device
    batch = cfg.train_dataloader.batch_size
    blocks = [weight_bytes(block) for block in blocks_of(getattr(model, 'backbone', model))]
    kept = {name: activations(model, batch, size, dtype).size for name, dtype in PRECISIONS.items()}
    weights, gradients = weight_bytes(model), gradient_bytes(model)
    return Job(name, batch, size, weights, gradients, sum(blocks), max(blocks, default=0), kept, multiply_adds)


def memory(job: Job, precision: str, gpus: int, sharded: bool = False) -> Memory:
    """What a GPU holds, with AdamW. The heads on proposals, losses and workspaces come on top.

    Args:
        job: the recipe.
        precision: 'float32', or 'bf16' under autocast, where parameters and optimizer remain float32.
        gpus: their number.
        sharded: by FSDP2; otherwise, on several, DDP, whose buckets hold the gradients a second time.
    """
    kept = job.activations[precision]
    if not sharded:
        buckets = 2 if gpus > 1 else 1
        return Memory(job.weights, job.gradients * buckets, 2 * job.gradients, 0, kept)
    # Whole at the same time, with their gradients: all that is no block, the block at work and the one fetched ahead.
    in_flight = 2 * (job.weights - job.blocks + 2 * job.largest_block)
    return Memory(job.weights / gpus, job.gradients / gpus, 2 * job.gradients / gpus, in_flight, kept)


def bytes_sent(job: Job, gpus: int, sharded: bool = False, param_bytes: int = 4) -> float:
    """What each GPU sends, and receives, in a training step whose batches are not accumulated.

    A ring of n sends (n-1)/n of a tensor to gather or to reduce and scatter it, and twice that to all-reduce it. DDP
    all-reduces the gradients. FSDP2 gathers the weights for the forward pass and again for the backward pass, and
    reduces and scatters the gradients, in float32.

    Args:
        job: the recipe.
        gpus: their number.
        sharded: by FSDP2.
        param_bytes: of a value of a block as FSDP2 sends it; 2 with ``sharding.param_dtype='bfloat16'``.
    """
    share = (gpus - 1) / gpus
    if not sharded:
        return 2 * share * job.gradients
    gathered = job.blocks * param_bytes / 4 + job.weights - job.blocks
    return share * (2 * gathered + job.gradients)


def compute_seconds(job: Job, precision: str, machine: Machine) -> float:
    """The time of a step's arithmetic on one GPU."""
    return job.operations / (machine.tflops[precision] * 1e12)


def send_seconds(sent: float, gpus: int, machine: Machine) -> float:
    """The time to send so many bytes; across nodes the slower link counts."""
    link = machine.node_link if gpus <= machine.gpus_per_node else machine.net_link
    return sent / (link * 1e9)


def images_per_second(job: Job, compute: float, send: float, gpus: int) -> tuple[float, float]:
    """Of all GPUs: with sending behind computing, and with all of it at the same time."""
    images = job.batch * gpus
    return images / (compute + send), images / max(compute, send)
