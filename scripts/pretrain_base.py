"""Pretrain the embedded base model from nothing: tokenizer, weights, training log and model card.

    python scripts/pretrain_base.py --out src/offprincipal/assets/base

A Qwen3-architecture decoder reads characters and learns every symbolic task of `offprincipal.tasks` on training prompts
alone. A share of the answers it is shown has one wrong character, so that it samples a right answer only some of the
time and reinforcement learning has something to sharpen. Killed, it continues from its last snapshot.
"""

import argparse
import json
import math
import os
import platform
import random
import string
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from offprincipal.tasks import SymbolicTask, mixture, symbolic_kinds
from offprincipal.training.evaluation import evaluate

CHARACTERS = "".join(chr(c) for c in range(32, 127)) + "\n"
MICRO_BATCHES = 4
SNAPSHOT_EVERY = 250
EVAL_PROMPTS = 256


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but for the machine's floating-point library."""

    seed: int = 20251111
    steps: int = 4000
    batch: int = 512
    learning_rate: float = 2e-3
    warmup: int = 200
    horizon: int = 5000
    cooldown: int = 1000
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    corrupted_share: float = 0.3
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    key_value_heads: int = 3
    head_dim: int = 32
    intermediate: int = 512


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `<pad>`, `<eos>` and `<unk>` beside them."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.head_dim,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def corrupt(answer: str, rng: random.Random) -> str:
    """The answer with one character replaced by another of its kind."""
    at = rng.randrange(len(answer))
    kind = next((c for c in (string.digits, string.ascii_lowercase) if answer[at] in c), string.digits)
    wrong = rng.choice([c for c in kind if c != answer[at]])
    return answer[:at] + wrong + answer[at + 1 :]


def micro_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(input_ids, labels) of one step, short sequences apart from long ones; labels are -100 off the answer."""
    rng = random.Random(f"{recipe.seed}/{step}")
    tasks = [SymbolicTask(kind) for kind in symbolic_kinds()]
    rows = []
    for problem in mixture(tasks, "train", recipe.batch, seed=recipe.seed + step):
        wrong = rng.random() < recipe.corrupted_share
        answer = corrupt(problem.answer, rng) if wrong else problem.answer
        prompt_ids = tokenizer(problem.prompt).input_ids
        answer_ids = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
        rows.append((prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids))
    rows.sort(key=lambda row: len(row[0]))
    size = recipe.batch // MICRO_BATCHES
    for chunk in (rows[i : i + size] for i in range(0, recipe.batch, size)):
        yield pad([ids for ids, _ in chunk], tokenizer.pad_token_id), pad([labels for _, labels in chunk], -100)


def pad(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, linear decay towards zero at the horizon, and a cooldown to zero at the last step."""
    decayed = recipe.learning_rate * min((step + 1) / recipe.warmup, 1 - step / recipe.horizon)
    return decayed * min(1.0, (recipe.steps - step) / recipe.cooldown)


def pretrain(recipe: Recipe, out: Path, compiled: bool) -> float:
    """Train, and write weights, tokenizer and log to `out`; returns the seconds it took over all its sittings."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas, fused=True)
    snapshot, log = out / "snapshot.pt", out / "pretraining.jsonl"
    start, seconds = 0, 0.0
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))
        print(f"continuing at step {start}")
    forward = torch.compile(model, dynamic=True) if compiled else model

    mean_loss = math.nan
    for step in range(start, recipe.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        batches = list(micro_batches(recipe, tokenizer, step))
        tokens = sum(int((labels != -100).sum()) for _, labels in batches)
        loss = 0.0
        for ids, labels in batches:
            logits = forward(input_ids=ids, use_cache=False).logits[:, :-1]
            part = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (part / tokens).backward()
            loss += part.item() / tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began
        mean_loss = loss if math.isnan(mean_loss) else 0.95 * mean_loss + 0.05 * loss
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "loss": round(mean_loss, 4), "seconds": round(seconds)}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if (step + 1) % SNAPSHOT_EVERY == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": seconds,
            }
            torch.save(state, snapshot.with_suffix(".part"))
            snapshot.with_suffix(".part").replace(snapshot)

    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    snapshot.unlink(missing_ok=True)
    return seconds


def write_card(recipe: Recipe, out: Path, seconds: float) -> None:
    """Measure the stored model on held-out prompts and write `evaluation.json` and the model card."""
    scores = {}
    for kind in symbolic_kinds():
        result = evaluate(out, [kind], prompts=EVAL_PROMPTS, samples=8, seed=recipe.seed)
        scores[kind] = {name: round(result[name], 4) for name in ("greedy_accuracy", "sampled_accuracy", "pass_at_k")}
    record = {
        "recipe": asdict(recipe),
        "seconds": round(seconds),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, CPU only"
        if not torch.cuda.is_available()
        else "GPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(
            p.numel() for p in Qwen3ForCausalLM.from_pretrained(out, trust_remote_code=False).parameters()
        ),
        "accuracy": scores,
    }
    (out / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    rows = "\n".join(
        f"| {kind} | {s['greedy_accuracy']:.1%} | {s['sampled_accuracy']:.1%} | {s['pass_at_k']:.1%} |"
        for kind, s in scores.items()
    )
    (out / "README.md").write_text(CARD.format(rows=rows, prompts=EVAL_PROMPTS, **record, **asdict(recipe)))


CARD = """---
license: apache-2.0
library_name: transformers
---
# offprincipal base

A Qwen3-architecture decoder of {parameters:,} parameters ({layers} layers, width {hidden}, {heads} query and
{key_value_heads} key-value heads, tied embeddings) that reads characters and answers short symbolic tasks. It exists
so that `offprincipal study` has a real base model to post-train within minutes; it is of no other use.

Made by `python scripts/pretrain_base.py --compile`: seed {seed}, {steps} steps of {batch} problems, AdamW at
{learning_rate}, in {seconds} s on {machine}. The loss is in `pretraining.jsonl`, every setting in
`evaluation.json`. Training prompts only: the prompts that `offprincipal.tasks.split_of` holds out were never shown.
{corrupted_share:.0%} of the answers shown had one wrong character, so a model that has learned a task perfectly still
samples a right answer only about 70 % of the time.

Accuracy on {prompts} held-out prompts a task, 8 samples each at temperature 1:

| task | greedy | sampled | pass@8 |
|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, rounds differently")
    parser.add_argument(
        "--card-only", action="store_true", help="measure weights that are there and write the card anew"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=arguments.steps)
    if arguments.card_only:
        seconds = json.loads((arguments.out / "pretraining.jsonl").read_text().splitlines()[-1])["seconds"]
    else:
        seconds = pretrain(recipe, arguments.out, arguments.compile)
    write_card(recipe, arguments.out, seconds)


if __name__ == "__main__":
    main()
