"""What tools/benchmark.py does."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from backbones import ARCHS
from densekit.benchmark import fit, machine, waits
from densekit.benchmark.backbone import BackboneCase
from densekit.benchmark.case import Case, Images, parse_images
from densekit.benchmark.peers import builders
from densekit.benchmark.plan import cases_of
from densekit.benchmark.run import run_cases
from densekit.benchmark.steps import StepCase
from densekit.benchmark.table import ALONE, TIERS
from densekit.cli import check_writable, user_errors
from densekit.engine.config import load_config
from densekit.report.image_size import padded

Say = Callable[[str], object]


def run(args: argparse.Namespace, say: Say) -> None:
    """Does what the arguments of the tool ask for.

    Args:
        args: of ``tools/benchmark.py``.
        say: takes lines for the terminal.

    Raises:
        UserError: if something given cannot be used.
    """
    with user_errors():
        device = machine.choose(args.device)
        if args.data:
            from densekit.benchmark import data_speed  # needs OpenCV, which nothing else here does

            say(data_speed.report(load_config(args.config, args.cfg_options), gpu_rates=args.gpu_rate))
            return
        if args.fit:
            _fit(args, device, say)
            return
        if args.waits:
            if len(args.images or ()) > 1:
                raise ValueError(f'--images {" ".join(args.images)}: --waits counts for one size; give one')
            say(waits.report(args.config, _images(args)[0] if args.images else (2, 128, 192), tuple(args.cfg_options)))
            return
        check_writable(args.out, '--out')
        cases = _cases(args, device)
    left = run_cases(
        cases,
        device=device,
        out=Path(args.out),
        say=say,
        rounds=args.rounds,
        budget=args.budget,
        again=args.again,
    )
    if left:
        say(f'{len(left)} cases are left for the next run of the same command, the first: {left[0]}')


def _cases(args: argparse.Namespace, device: torch.device) -> list[tuple[int, Case]]:
    if args.backbone:
        return [(ALONE, case) for case in _backbone_cases(args, device)]
    if args.step:
        return [(ALONE, case) for case in _step_cases(args, device)]
    images = [parse_images(text) for text in args.images or ()]
    return [(tier, case) for tier in args.tier or TIERS for case in cases_of(tier, device, images)]


def _fit(args: argparse.Namespace, device: torch.device, say: Say) -> None:
    memory = fit.parse_size(args.fit)
    if len(args.images or ()) > 1:
        raise ValueError(f'--images {" ".join(args.images)}: --fit plans for one size; give one')
    cfg = load_config(args.config, args.cfg_options)
    size = padded(_images(args)[0][1:], cfg.model.get('data_preprocessor')) if args.images else fit.image_size(cfg)
    if args.verify and device.type != 'cuda':
        raise ValueError('--verify takes steps on a CUDA GPU; without it the plan is made on the CPU')
    needs = fit.plan(args.config, size, device, args.cfg_options)
    say(fit.report(args.config, memory, size, needs))
    if args.verify:
        for need in needs:
            if need.largest_batch(memory):
                say(fit.verify(args.config, need, memory, size, device, args.cfg_options))


def _step_cases(args: argparse.Namespace, device: torch.device) -> list[StepCase]:
    load_config(args.config, args.cfg_options)  # mistakes in it before anything is measured
    return [
        StepCase(args.config, images, dtype, phase == 'train', options=tuple(args.cfg_options))
        for images in _images(args)
        for dtype in _dtypes(args, device)
        for phase in args.phase
    ]


def _dtypes(args: argparse.Namespace, device: torch.device) -> list[str]:
    return args.dtype or ['bf16' if device.type == 'cuda' else 'fp32']


def _backbone_cases(args: argparse.Namespace, device: torch.device) -> list[BackboneCase]:
    if args.backbone not in ARCHS:
        raise ValueError(f'--backbone {args.backbone} is unknown; choose one of {", ".join(ARCHS)}')
    for phase in args.phase:
        known, left_out = builders(device, training=phase == 'train')
        for name in args.peers or ():
            if name not in known:
                reason = f' ({left_out[name]})' if name in left_out else ''
                raise ValueError(f'--peers {name} is not here{reason}; there are {", ".join(known)}')
    return [
        BackboneCase(
            args.backbone,
            images,
            dtype,
            phase == 'train',
            modes=tuple(args.mode),
            peers=tuple(args.peers or ()),
            drop_path=args.drop_path,
        )
        for images in _images(args)
        for dtype in _dtypes(args, device)
        for phase in args.phase
    ]


def _images(args: argparse.Namespace) -> list[Images]:
    if not args.images:
        raise ValueError('--images is missing: give numbers and sizes, such as --images 2x512x512 16x512x512')
    return [parse_images(text) for text in args.images]
