"""Stand-ins for what other packages wrap around optimizers: schedule-free averaging, Lookahead."""

from __future__ import annotations

import torch


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD, plainly: trains at y, between the iterate z and its average x; refuses a step at x."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": True, "k": 0})

    @torch.no_grad()
    def _go(self, train, weight):
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if p in self.state:
                        p.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["train_mode"] = train

    def train(self):
        self._go(True, lambda beta: 1 - beta)

    def eval(self):
        self._go(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, 1 - 1 / group["beta"])
                    z.sub_(p.grad, alpha=group["lr"])
                    p.lerp_(z, 1 / group["k"]).lerp_(z, 1 - group["beta"])


class Lookahead(torch.optim.Optimizer):
    """Slow weights around an optimizer, whose state dict is nested and has no ``param_groups`` on top."""

    def __init__(self, inner, k=2):
        self.inner, self.k, self.count = inner, k, 0
        self.defaults = inner.defaults
        self.state = {p: {"slow": p.detach().clone()} for g in inner.param_groups for p in g["params"]}
        super().__setstate__({})

    @property
    def param_groups(self):
        return self.inner.param_groups

    def state_dict(self):
        slow = [s["slow"].clone() for s in self.state.values()]
        return {"count": self.count, "slow": slow, "wrapped": {"inner": self.inner.state_dict()}}

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict["wrapped"]["inner"])
        self.count = state_dict["count"]
        for s, slow in zip(self.state.values(), state_dict["slow"], strict=True):
            s["slow"].copy_(slow)

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.count += 1
        if self.count % self.k == 0:
            for p, s in self.state.items():
                p.copy_(s["slow"].lerp_(p, 0.5))
