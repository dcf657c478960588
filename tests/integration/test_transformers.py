"""LearnedOptimizer in Hugging Face's Trainer, with a tiny language model made from a configuration: no download."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from integration.regression import Make, assert_same, copies, each_optimizer, ignore_warnings_of_frameworks
from learned_optim import LearnedOptimizer

transformers: Any = pytest.importorskip("transformers", reason="needs transformers: the extra 'frameworks'")

STEPS = 24
WORDS = 16
pytestmark = [pytest.mark.slow, *ignore_warnings_of_frameworks]


def language_model() -> Any:
    """Two thousand parameters, the embedding tied to the output; no dropout."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def sentences() -> list[dict[str, Tensor]]:
    """Every word follows from the one before it."""
    words = (torch.arange(32).unsqueeze(1) + 3 * torch.arange(8)) % WORDS
    return [{"input_ids": each, "labels": each} for each in words]


class Collator:
    """Stacks sentences, and remembers the batches so that a plain loop can repeat them."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
        self.batches.append(batch)
        return batch


def arguments(folder: Path, **options: Any) -> Any:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    options = {"max_steps": STEPS, "per_device_train_batch_size": 8, "use_cpu": True, **quiet, **options}
    return transformers.TrainingArguments(output_dir=str(folder), **options)


def linear(optimizer: Optimizer) -> LambdaLR:
    """The linear schedule to zero that the Trainer makes if it is given no scheduler."""
    return LambdaLR(optimizer, lambda step: 1.0 - step / STEPS)


def plain_loop(model: Any, optimizer: Optimizer, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Train as the Trainer does with its default options: clipping at 1, a linear schedule."""
    scheduler = linear(optimizer)
    for batch in batches:
        model(**batch, num_items_in_batch=batch["labels"].numel()).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
    return copies(model.parameters())


@torch.no_grad()
def loss_of(model: Any) -> float:
    batch = Collator()(sentences())
    return float(model(**batch).loss)


@each_optimizer
def test_trainer_matches_a_plain_loop(make: Make, tmp_path: Path) -> None:
    model, other, collator = language_model(), language_model(), Collator()
    before = loss_of(model)
    optimizers = make(model.parameters()), None
    transformers.Trainer(
        model, arguments(tmp_path), data_collator=collator, train_dataset=sentences(), optimizers=optimizers
    ).train()
    expected = plain_loop(other, make(other.parameters()), collator.batches[:STEPS])
    assert_same(model.parameters(), expected)
    assert loss_of(model) < 0.9 * before


def test_trainer_built_optimizer_matches_a_plain_loop(tmp_path: Path) -> None:
    model, other, collator = language_model(), language_model(), Collator()
    before = loss_of(model)
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path, weight_decay=0.01),
        data_collator=collator,
        train_dataset=sentences(),
        optimizer_cls_and_kwargs=(LearnedOptimizer, {"rule": "default", "lr": 2.0}),
    )
    trainer.train()
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == [0.01, 0.0]  # of matrices; of biases and norms
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = [
        {"params": [p for name, p in other.named_parameters() if (name in decayed) == kept], "weight_decay": decay}
        for kept, decay in ((True, 0.01), (False, 0.0))
    ]
    assert_same(model.parameters(), plain_loop(other, LearnedOptimizer(groups, lr=2.0), collator.batches[:STEPS]))
    assert loss_of(model) < 0.9 * before


@each_optimizer
def test_trainer_resume_is_bit_exact(make: Make, tmp_path: Path) -> None:
    def trainer(model: Any) -> Any:
        optimizer = make(model.parameters())
        options = arguments(tmp_path, save_strategy="steps", save_steps=STEPS // 2)
        optimizers = optimizer, linear(optimizer)
        return transformers.Trainer(
            model, options, data_collator=Collator(), train_dataset=sentences(), optimizers=optimizers
        )

    model, other = language_model(), language_model()
    whole, resumed = trainer(model), trainer(other)
    whole.train()
    state = copy.deepcopy(whole.optimizer.state_dict()["state"])
    with torch.no_grad():  # what is not restored is seen
        for parameter in other.parameters():
            parameter.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same(other.parameters(), model.parameters())
    for one, expected in zip(resumed.optimizer.state_dict()["state"].values(), state.values(), strict=True):
        assert all(one[entry].dtype == expected[entry].dtype for entry in expected)
        assert_same(one.values(), expected.values())
