"""Fine-tune a causal language model on a text by LoRA (peft), and perturb only the adapters.

python examples/finetune.py --data shakespeare.txt --model path/to/a/model --method SAM --set rho=0.05 --output adapters

Without ``--model`` the model is a small Llama with random weights that reads bytes, to check that everything works.
With ``--train-head`` the output layer is trained too. It gets the final direction, but is not perturbed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import charlm
import torch
import training_runs
from torch import Tensor, nn

import gam_fast

try:
    import peft
    import transformers
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"{error}\nthis example needs more packages: pip install peft transformers")


@dataclass(frozen=True, kw_only=True)
class Settings(charlm.Settings):
    """The settings of a run, apart from its text and its model."""

    method: str = "SAM"
    rank: int = 8
    targets: str = "q_proj,v_proj"
    train_head: bool = False
    context: int = 64
    steps: int = 500
    batch: int = 16
    lr: float = 2e-3
    warm_up: int = 20
    weight_decay: float = 0.0
    test_every: int = 100


PRESETS: Mapping[str, Settings] = {"lora": Settings(hyper={"rho": 0.05})}


class Text(charlm.Text):
    """A text as the tokens of a model: the first nine tenths for training, the rest for tests."""

    def __init__(self, path: Path, device: torch.device, model: str | None) -> None:
        if model is None:
            numbers = list(path.read_bytes())
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
            numbers = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
        tokens = torch.tensor(numbers, device=device)
        self.train, self.test = tokens.tensor_split([len(tokens) * 9 // 10])


class Run(charlm.Run):
    """A model with adapters in training."""

    def __init__(self, settings: Settings, text: Text, device: torch.device, model: str | None) -> None:
        self.name, self.lora = model, settings
        super().__init__(settings, text, device)

    def build(self) -> nn.Module:
        """Return the model with adapters."""
        if self.name is None:
            sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **sizes))
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(self.name)
        targets = self.lora.targets.split(",")
        head = ["lm_head"] if self.lora.train_head else None
        adapters: nn.Module = peft.get_peft_model(
            model,
            peft.LoraConfig(r=self.lora.rank, target_modules=targets, modules_to_save=head, task_type="CAUSAL_LM"),
        )
        return adapters

    def groups(self) -> list[dict[str, Any]]:
        """Return the adapters as the perturbed group, and the rest of the trained parameters."""
        return gam_fast.subsets.lora(self.model)

    def scores(self, x: Tensor) -> Tensor:
        """Return the model's scores for ``x``."""
        found: Tensor = self.model(input_ids=x).logits
        return found


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """Return the arguments, and the preset's settings with the changes of the command line."""
    more: dict[str, dict[str, Any]] = {
        "--data": {"type": Path, "required": True, "help": "a text in UTF-8"},
        "--model": {"help": "a folder or a name that transformers knows"},
        "--output": {"type": Path, "metavar": "FOLDER", "help": "write the adapters there, at the end"},
    }
    helps = {"targets": "layers that get adapters, with commas", "rank": "rank of the adapters"}
    return training_runs.parse(argv, PRESETS, ["AdamW"], more, {}, helps)


def main(argv: Sequence[str] | None = None) -> charlm.Curve:
    """Fine-tune from the command line, and return the curve."""
    arguments, settings = parse(argv)
    device = torch.device(arguments.device)
    run = Run(settings, Text(arguments.data, device, arguments.model), device, arguments.model)
    curve: charlm.Curve = training_runs.carry_out(run, arguments)
    if arguments.output is not None:
        run.model.save_pretrained(arguments.output)  # type: ignore[operator]  # of peft
    return curve


if __name__ == "__main__":
    main()
