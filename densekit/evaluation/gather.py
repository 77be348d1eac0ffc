"""Detections of several processes in the first one. Arrays and JSON travel, not pickles, which could run code."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_COLUMNS = ('bboxes', 'scores', 'labels', 'mask_scores')


def pack(results: Sequence[tuple[dict, dict]]) -> bytes:
    """Detections as bytes.

    Args:
        results: what mmdet's CocoMetric keeps: of each image its ground truth and its detections.

    Returns:
        NumPy's format for several arrays, of which one is JSON.
    """
    found = [result for _, result in results]
    rles = [rle for result in found for rle in result.get('masks', ())]
    header = {
        'images': [{**gt, 'keys': sorted(result)} for gt, result in results],
        'ids': [result['img_id'] for result in found],
        'dtypes': {key: str(result[key].dtype) for result in found[:1] for key in _COLUMNS if key in result},
    }
    counts = [rle['counts'] for rle in rles]
    arrays = {
        'header': np.frombuffer(json.dumps(header, default=_plain).encode(), dtype=np.uint8),
        'detections': np.array([len(result['scores']) for result in found], dtype=np.int64),
        'sizes': np.array([rle['size'] for rle in rles], dtype=np.int64).reshape(-1, 2),
        'lengths': np.array([len(count) for count in counts], dtype=np.int64),
        'counts': np.frombuffer(b''.join(counts), dtype=np.uint8),
    }
    for key in _COLUMNS:
        parts = [result[key] for result in found if key in result]
        arrays[key] = np.concatenate(parts) if parts else np.zeros(0)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(content: bytes) -> list[tuple[dict, dict]]:
    """The reverse of :func:`pack`."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        columns = {key: arrays[key] for key in arrays.files}
    header = json.loads(columns['header'].tobytes())
    counts = columns['counts'].tobytes()
    ends = np.cumsum(columns['lengths'])
    rles = iter(
        [
            {'size': size, 'counts': counts[end - length : end]}
            for size, length, end in zip(
                columns['sizes'].tolist(), columns['lengths'].tolist(), ends.tolist(), strict=True
            )
        ]
    )
    taken = dict.fromkeys(_COLUMNS, 0)
    results = []
    for image, img_id, number in zip(header['images'], header['ids'], columns['detections'].tolist(), strict=True):
        keys = image.pop('keys')
        result: dict[str, Any] = {'img_id': img_id}
        for key in _COLUMNS:
            if key in keys:
                result[key] = columns[key][taken[key] : taken[key] + number]
                taken[key] += number
        if 'masks' in keys:
            result['masks'] = [next(rles) for _ in range(number)]
        results.append((image, result))
    return results


def gather_bytes(content: bytes) -> list[bytes]:
    """What each process has, in the first one; in the others nothing."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [content]
    device = torch.device('cuda', torch.cuda.current_device()) if dist.get_backend() == 'nccl' else torch.device('cpu')
    first = dist.get_rank() == 0
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(content)], device=device))
    most = max(int(length) for length in lengths)
    sent = torch.zeros(most, dtype=torch.uint8)
    sent[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    received = [torch.zeros(most, dtype=torch.uint8, device=device) for _ in lengths] if first else None
    dist.gather(sent.to(device), received)
    if received is None:
        return []
    return [part[: int(length)].cpu().numpy().tobytes() for part, length in zip(received, lengths, strict=True)]


def _plain(value: Any) -> Any:
    """What JSON does not know."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    raise TypeError(f'{type(value).__name__} cannot travel between processes')
