"""Where a step's time goes: the shares must be those of the step."""
import pytest

from paper import cpu


@pytest.mark.slow
@pytest.mark.parametrize("made", [cpu.stage1, lambda: cpu.stage2(64)], ids=["stage 1", "stage 2"])
def test_shares_of_a_step(made):
    """Broken: an operation would count twice, or the optimizers' time as the model's."""
    total, *shares = cpu.shares_of_time(*made(), repetitions=2)
    assert float(total) > 0 and len(shares) == len(cpu.KINDS) + 3
    shares = [int(share.rstrip("%")) for share in shares]
    assert all(share >= 0 for share in shares) and abs(sum(shares) - 100) <= len(shares)
    assert shares[0] > 0 and shares[-2] > 0  # matrix products, Muon
