"""The cost of the paper's models: what is counted is what a reader can work out by hand."""
import pytest

from paper import cost


@pytest.mark.slow
def test_flops_of_the_denoiser(capsys):
    """Fails if the table's FLOPs leave out attention, count a backward pass twice, or are not those of the codes that
    the sparse denoiser is trained on."""
    cost.main([])
    rows = [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines()]
    width, layers, C, M = 384, 12, 4096, 128

    def gflops(queries, keys):
        block = 2 * width ** 2 * (10 * queries + 2 * keys) + 4 * queries * keys * width + 12 * width ** 2
        return (layers * block + 2 * queries * width * (M + 1)) / 1e9

    assert [row[0] for row in rows[2:]] == ["203.3 M", "36.0 M", "36.0 M", "136.7 M", "136.7 M"]
    for row, forward, training in ((rows[3], gflops(C, C), gflops(C, C)),
                                   (rows[4], gflops(C, M), gflops(cost.LOSS_CODES, M))):
        assert float(row[1]) == pytest.approx(forward, rel=0.01)
        assert float(row[2].strip(" |")) == pytest.approx(3 * training, rel=0.02)
