"""Where a step's time goes: the shares must be those of the step, and every comparison must run another step."""
import pytest
import torch

from paper import cpu


@pytest.mark.slow
@pytest.mark.parametrize("made", [cpu.stage1, lambda: cpu.stage2("digits", 64, 8, 4, 24)], ids=["stage 1", "stage 2"])
def test_shares_of_a_step(made):
    """Broken: an operation would count twice, or the optimizers' time as the model's."""
    total, *shares = cpu.shares_of_time(*made(), repetitions=2)
    assert float(total) > 0 and len(shares) == len(cpu.KINDS) + 3
    shares = [int(share.rstrip("%")) for share in shares]
    assert all(share >= 0 for share in shares) and abs(sum(shares) - 100) <= len(shares)
    assert shares[0] > 0 and shares[-2] > 0  # matrix products, Muon


@pytest.mark.slow
def test_variations_are_other_steps_of_the_same_training():
    """Broken: a column of the table would show the step as it is; or a comparison would change the gradient beyond
    rounding, so that it would be no alternative."""
    gradients, kernels, threads = {}, {}, torch.get_num_threads()
    for name, options in [("", {}), *cpu.VARIATIONS.items()]:
        if options.get("compile"):
            continue  # needs a compiler
        torch.manual_seed(0)
        model, step, cfg = cpu.stage2("digits", 64, 8, 4, 24, **options)
        torch.nn.init.normal_(model.to_logits.weight)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        gradients[name] = model.to_logits.weight.grad
        kernels[name] = {event.key for event in profile.key_averages()}
        assert torch.get_num_threads() == options.get("threads", threads)
        torch.set_num_threads(threads)
    assert all((gradient - gradients[""]).norm() < 0.02 * gradients[""].norm() for gradient in gradients.values())
    assert "aten::scaled_dot_product_attention" in kernels["fused attention"]
    assert "aten::scaled_dot_product_attention" not in kernels["written-out attention"]


def test_in_turn():
    """Broken: the warm-up would count, or the functions would not alternate, so that noise would look like a
    difference."""
    calls = []
    seconds = cpu.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == list("abababab") and set(seconds) == {"a", "b"} and max(seconds.values()) < 1
