"""AdaLoRA's importance and budget against PEFT's allocator, over some steps."""

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator

from lorasurgery.kernels import adalora_importance

RANKS, OUT, IN = {"q": 6, "v": 6}, 9, 11


class Layer(torch.nn.Module):
    """The parameters of two adapted layers under PEFT's names."""

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        for name, r in RANKS.items():
            sizes = {"lora_A": (r, IN), "lora_B": (OUT, r), "lora_E": (r, 1)}
            held = {
                k: torch.nn.ParameterDict({"x": torch.randn(s, generator=rng)})
                for k, s in sizes.items()
            }
            self.add_module(name, torch.nn.ModuleDict(held))


def test_scores_and_kept_triplets_are_peft_s():
    rng = torch.Generator().manual_seed(0)
    model = Layer(rng)
    config = AdaLoraConfig(
        init_r=6, target_r=3, tinit=1, tfinal=2, total_step=20, deltaT=1, target_modules=["q"]
    )
    allocator = RankAllocator(model, config, "x")
    state = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    for step in range(1, 9):
        means = {}
        for name, p in model.named_parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=rng)
            p.grad = torch.randn(p.shape, generator=rng)
            axis = 0 if "lora_B" in name else 1
            *state[name], means[name] = adalora_importance.run(
                p.data, p.grad, *state[name], axis, config.beta1, config.beta2
            )
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        budget, pattern = allocator.update_and_allocate(model, step)
        for name, (sensitivity, uncertainty) in state.items():
            torch.testing.assert_close(sensitivity, allocator.exp_avg_ipt[name])
            torch.testing.assert_close(uncertainty, allocator.exp_avg_unc[name])
        score = {m: sum(means[f"{m}.lora_{f}.x"] for f in "EAB") for m in RANKS}
        keep = adalora_importance.kept(torch.cat(list(score.values())), budget)
        if pattern is not None and budget < 12:
            got = {m: keep[6 * i : 6 * i + 6] for i, m in enumerate(RANKS)}
            for m in RANKS:
                want = pattern[f"{m}.lora_E.x"]
                assert got[m].tolist() == want, step
                shown = model.get_parameter(f"{m}.lora_E.x")
                assert torch.equal(shown[~got[m]], torch.zeros(int((~got[m]).sum()), 1))
                assert torch.equal(shown[got[m]], before[f"{m}.lora_E.x"][got[m]])
    assert budget < 12
