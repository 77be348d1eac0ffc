import dataclasses

import pytest

from densekit.report import scaling_tables
from densekit.report.scaling import (
    Job,
    Machine,
    bytes_sent,
    compute_seconds,
    images_per_second,
    job_of,
    memory,
    send_seconds,
)

# 1000 parameters, of which 800 in ten equal blocks; 500 multiply-adds per image.
JOB = Job('toy', 2, (8, 8), 4000, 4000, 3200, 320, {'float32': 900, 'bf16': 500}, 500)


def ring(n, chunks, rounds):
    """What each process of a ring sends, counted round by round: in each it passes one chunk on to the next."""
    sent = [0.0] * n
    for _ in range(rounds):
        for process in range(n):
            sent[process] += chunks
    assert len(set(sent)) == 1
    return sent[0]


@pytest.mark.parametrize('n', [1, 2, 8, 64])
def test_what_is_sent_is_what_a_ring_sends(n):
    gather = ring(n, 4000 / n, n - 1)  # after n - 1 rounds all have all; to reduce and scatter takes as many
    assert bytes_sent(JOB, n) == pytest.approx(2 * gather)
    assert bytes_sent(JOB, n, sharded=True) == pytest.approx(3 * gather)
    # In bfloat16 half of each block is sent, and all of the 200 parameters outside, twice; the gradients in float32.
    halved = 2 * ring(n, (3200 / 2 + 800) / n, n - 1) + gather
    assert bytes_sent(JOB, n, sharded=True, param_bytes=2) == pytest.approx(halved)


def test_frozen_parameters_have_no_gradients_to_send_but_are_gathered():
    frozen = dataclasses.replace(JOB, gradients=1000)
    assert bytes_sent(frozen, 2) == 1000
    assert bytes_sent(frozen, 2, sharded=True) == 0.5 * (2 * 4000 + 1000)
    assert memory(frozen, 'float32', 1).total == 4000 + 1000 + 2000 + 900


def test_what_a_gpu_holds():
    assert memory(JOB, 'float32', 1).total == 4 * 4000 + 900  # weights, gradients, twice AdamW, activations
    assert memory(JOB, 'float32', 8).total == memory(JOB, 'float32', 64).total == 5 * 4000 + 900
    assert memory(JOB, 'bf16', 8).total == 5 * 4000 + 500
    cut = memory(JOB, 'float32', 8, sharded=True)
    assert (cut.weights, cut.gradients, cut.state) == (500, 500, 1000)
    assert cut.in_flight == 2 * (800 + 2 * 320)
    assert cut.total == 2000 + 2880 + 900


def test_time():
    machine = Machine(4, {'float32': 1e-9, 'bf16': 4e-9}, node_link=1e-6, net_link=1e-7)
    assert JOB.operations == 2 * 500 * 3 * 2  # two for a multiply-add, forward and twice backward, two images
    assert compute_seconds(JOB, 'float32', machine) == pytest.approx(6)
    assert compute_seconds(JOB, 'bf16', machine) == pytest.approx(1.5)
    assert send_seconds(1000, 4, machine) == pytest.approx(1)
    assert send_seconds(1000, 5, machine) == pytest.approx(10)  # one GPU more is on another node
    assert images_per_second(JOB, 6, 2, 4) == (1, pytest.approx(8 / 6))
    assert images_per_second(JOB, 2, 6, 4) == (1, pytest.approx(8 / 6))


def test_a_recipe_is_counted():
    job = job_of(str(scaling_tables.ROOT / scaling_tables.CONFIGS[2]))
    assert (job.name, job.batch, job.size) == ('upernet_convnext_xl_in22k_640_ade20k', 2, (640, 640))
    assert round(job.gradients / 4e6) == 391  # as table 4 of arXiv 2201.03545 has it
    assert round(job.multiply_adds / 1e9) == round(3335 / 4)  # published for 2560 x 640, four times as large
    # Depthwise 7 x 7, norm, to four times the width and back, layer scale; with biases.
    blocks = [
        8 * c * c + 58 * c for c, depth in zip((256, 512, 1024, 2048), (3, 3, 27, 3), strict=True) for _ in range(depth)
    ]
    assert (job.blocks, job.largest_block) == (4 * sum(blocks), 4 * max(blocks))
    assert job.weights > job.gradients  # the statistics of BatchNorm


def test_the_document_has_these_tables():
    text = scaling_tables.DOC.read_text(encoding='utf-8')
    written = scaling_tables.document_tables()
    assert text == scaling_tables.with_tables(text, written), 'run python -m densekit.report.scaling_tables'
    assert len(written['memory'].splitlines()) == 2 + 6 * len(scaling_tables.CONFIGS)


def test_only_what_is_between_the_comments_is_replaced():
    begin, end = '<!-- a: written by python -m densekit.report.scaling_tables -->', '<!-- end of a -->'
    text = f'before\n{begin}\nold\n{end}\nafter\n'
    assert scaling_tables.with_tables(text, {'a': 'new'}) == f'before\n{begin}\nnew\n{end}\nafter\n'
    for damaged in ('', f'{end}\n{begin}', text + text, text + end):
        with pytest.raises(ValueError, match='each once'):
            scaling_tables.with_tables(damaged, {'a': 'new'})


def test_other_numbers_than_the_documents(tiny, capsys):
    argv = [tiny.seg, '--gpus', '2', '4', '--gpus-per-node', '2', '--net-link', '0.001']
    assert scaling_tables.main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.count(', calculated\n') == 4 and '| FSDP2, 4 GPUs |' in shown and '64 GPUs' not in shown
    assert scaling_tables.main(['no/such.py']) == 2
    assert 'no/such.py' in capsys.readouterr().err


@pytest.mark.parametrize('argv', [['--gpus', '16'], ['a.py', '--gpus', '0'], ['a.py', '--net-link', '-1']])
def test_numbers_that_cannot_be(argv, capsys):
    with pytest.raises(SystemExit):
        scaling_tables.main(argv)
    assert 'CONFIG' in capsys.readouterr().err
