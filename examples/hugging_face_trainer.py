"""Hugging Face's Trainer: a two-layer GPT-2, from scratch, on sums of two numbers. No download.

    pip install 'learned-optim[frameworks]'
    python examples/hugging_face_trainer.py

The Trainer brings its linear schedule and its clipping; only the optimizer's class is exchanged. Prints the loss at the
end (guessing digits evenly: 2.3 nats) and what the model says of a sum.
"""

import argparse
import tempfile

import torch
import transformers

from learned_optim import LearnedOptimizer

SYMBOLS = "0123456789+="


def sums() -> list[dict[str, torch.Tensor]]:
    """All sums of two numbers of two digits, 00+00=000 to 99+99=198."""
    texts = [f"{a:02}+{b:02}={a + b:03}" for a in range(100) for b in range(100)]
    numbers = [torch.tensor([SYMBOLS.index(symbol) for symbol in text]) for text in texts]
    # Only the result is to be learned: -100 takes the two numbers out of the loss.
    return [{"input_ids": row, "labels": torch.cat([torch.full((6,), -100), row[6:]])} for row in numbers]


def main() -> None:
    """Train and ask."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    transformers.set_seed(0)
    sizes = {"vocab_size": len(SYMBOLS), "n_positions": 9, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=128,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
            ),
            train_dataset=sums(),
            optimizer_cls_and_kwargs=(LearnedOptimizer, {}),
        )
        print(f"mean loss {trainer.train().training_loss:.4f}")
    model.eval()
    text = torch.tensor([[SYMBOLS.index(symbol) for symbol in "58+67="]])
    for _ in range(3):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    print("".join(SYMBOLS[symbol] for symbol in text[0].tolist()))


if __name__ == "__main__":
    main()
