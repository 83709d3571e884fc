"""Everything that runs on a CUDA GPU, run on one: is it what a CPU gives, and how fast is it?

    python scripts/check_gpu.py --out gpu --pair /dev/shm/pair      # about 8 minutes on an H100 with 16 cores

Parts, of which `--only` chooses some: `tests` (those marked `gpu`), `stages` (what one layer of a 7 B-shaped model
spends where, a matrix at a time on one thread), `pair` (`compare` on the whole pair, a process of its own, for each
number of layers), `train` (GRPO from the embedded base), and `pretrained` (GRPO from `--model`, as the profile of that
name has it, computed in either precision). Writes gpu.json and gpu.md into the folder `--out`, after every part, and
exits 1 if a test failed or a part could not be run.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--pair", type=Path, help="folder for the pair, best in memory; default: a temporary one")
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 28], help="of the pairs that are compared")
    parser.add_argument("--shape", default="7b", help="as make_synthetic.py has it")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="default: all that can be run")
    parser.add_argument("--model", help="a pretrained model: a folder, a GGUF file or a Hugging Face id")
    parser.add_argument("--device", default="cuda", help="cpu: the same where there is no GPU, to check this script")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is at hand: this script is for a machine with one")
    given.only = given.only or [name for name in PARTS if name != "pretrained" or given.model]
    given.out.mkdir(parents=True, exist_ok=True)
    report: Report = {"machine": machine(given.device)}
    with tempfile.TemporaryDirectory() as scratch:
        given.pair = given.pair or Path(scratch)
        for name in given.only:
            began = time.perf_counter()
            try:
                report[name] = PARTS[name](given)
            except Exception as error:
                traceback.print_exc()
                report[name] = {"failed": f"{type(error).__name__}: {error}"}
            report[name]["seconds"] = round(time.perf_counter() - began, 1)
            (given.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
            (given.out / "gpu.md").write_text(table(report))
            print(json.dumps({name: report[name]}), flush=True)
    sys.exit(any(report[name].get("failed") for name in given.only))


def machine(device: str) -> Report:
    on_gpu = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30) if on_gpu else None,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def run_tests(given: argparse.Namespace) -> Report:
    """The tests that are marked `gpu`."""
    env = os.environ | {"OFFPRINCIPAL_TEST_DEVICE": given.device, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "--durations=8"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout[-9000:], flush=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-500:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"result": lines[-1], "failed": failed or (done.returncode != 0 and lines[-1])}


def stages(given: argparse.Namespace) -> Report:
    """Thread-seconds by stage, for every matrix of one layer, measured alone."""
    from offprincipal.checkpoints import open_checkpoint
    from offprincipal.measures.pair import BaseMatrix, MatrixPair
    from offprincipal.measures.settings import MatrixSettings

    base, tuned = (open_checkpoint(pair_of(given, 1) / side) for side in ("base", "tuned"))
    found: dict[str, dict[str, float]] = {}
    torch.set_num_threads(1)
    names = [name for name in base.tensors if name.endswith("_proj.weight") and ".layers.0." in name]
    for name in [names[0], *names]:  # the first one twice: once for all that is compiled or loaded on the way
        spent: dict[str, float] = defaultdict(float)

        @contextmanager
        def stage(label: str, spent: dict[str, float] = spent) -> Iterator[None]:
            began = time.perf_counter()
            yield
            if given.device == "cuda":
                torch.cuda.synchronize()
            spent[label] += time.perf_counter() - began

        with stage("read"):
            sides = [checkpoint.read(name).reshape(base.tensors[name].shape) for checkpoint in (base, tuned)]
        matrix = BaseMatrix(name, sides[0], MatrixSettings(device=given.device))
        pair = MatrixPair(matrix, sides[1])
        touch: dict[str, Callable[[], Any]] = {
            "scan": lambda pair=pair: (pair.scan, pair.counts, pair.changed),
            "transfer": lambda pair=pair: pair.spectral.update,
            "decompose the base": lambda matrix=matrix: matrix.spectral.svd,
            "spectrum of the update": lambda pair=pair: pair.spectral.update_spectrum,
            "decompose the tuned": lambda pair=pair: (pair.spectral.svd, pair.spectral.angles),
            "spectral nulls": lambda pair=pair: pair.spectral.all_angles(),
            "masks": lambda matrix=matrix: matrix.mask_cells,
            "margin null": lambda pair=pair: pair.margins,
            "overlaps and score tests": lambda pair=pair: pair.overlaps,
        }
        for label, compute in touch.items():
            with stage(label):
                compute()
        solvers = f"{matrix.spectral.svd.solver}/{pair.spectral.svd.solver}"
        found[name] = {label: round(seconds, 3) for label, seconds in spent.items()} | {"solvers": solvers}  # type: ignore[dict-item]
    peak = torch.cuda.max_memory_allocated() / 2**30 if given.device == "cuda" else None
    return {"matrices": found, "gpu_peak_gib": peak}


def whole_pair(given: argparse.Namespace) -> Report:
    """`compare`, all metrics, nothing in the cache, as a process of its own; the GPU's own rows of one layer."""
    found: Report = {}
    for layers in given.layers:
        pair = pair_of(given, layers)
        for file in sorted(pair.glob("*/*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass
        out = given.out / f"compare-{layers}"
        command = [sys.executable, "-c", "from offprincipal.cli import main; main()", "compare", pair / "base"]
        command += [pair / "tuned", "--device", given.device, "--no-cache", "--out", out]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-2000:])
        summary = json.loads((out / "summary.json").read_text())["runs"]["tuned"]
        found[f"{layers} layers"] = {
            "compare_seconds": round(seconds, 1),
            "solvers": summary["solvers"],
            "warnings": summary["warnings"],
        }
    return found


def train_grpo(given: argparse.Namespace) -> Report:
    """A few steps of GRPO from the embedded base: seconds a step, and what was learned."""
    values: Report = {"model": "embedded", "batch": 240, "tasks": ("add", "sort", "count"), "learning_rate": 1.5e-5}
    return a_few_steps(given, "grpo", values | {"eval_samples": 1, "eval_prompts": 96, "monitor": 5})


def train_pretrained(given: argparse.Namespace) -> Report:
    """A few steps of GRPO from `--model`, with the settings of the profile `pretrained`, in either precision."""
    from offprincipal.paper.profile import load_profile

    if given.model is None:
        raise ValueError("name a pretrained model with --model")
    values = load_profile("pretrained").training | {"model": given.model, "tasks": ("add@1", "maximum@1")}
    values |= {"eval_prompts": 0}
    return {
        compute: a_few_steps(given, f"pretrained-{compute}", values | {"compute": compute})
        for compute in ("float32", "bfloat16")
    }


def a_few_steps(given: argparse.Namespace, name: str, values: Report) -> Report:
    from offprincipal.training import parse_settings, train

    out = given.out / name
    train(parse_settings(values | {"recipe": "grpo", "steps": 10, "device": given.device}), out, quiet=True)
    record = json.loads((out / "run.json").read_text())
    log = record["log"]
    return {
        "device": record["machine"].get("device"),
        "seconds_a_step": round(sum(entry["seconds"] for entry in log[2:]) / len(log[2:]), 2),
        "reward_first_last": [log[0]["reward"], log[-1]["reward"]],
        "sampled_accuracy": {when: found["sampled_accuracy"] for when, found in record["accuracy"].items() if found},
    }


PARTS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "tests": run_tests,
    "stages": stages,
    "pair": whole_pair,
    "train": train_grpo,
    "pretrained": train_pretrained,
}


def pair_of(given: argparse.Namespace, layers: int) -> Path:
    """A synthetic pair of that many layers, made once."""
    folder: Path = given.pair / f"{re.sub(r'[^0-9a-z]', '-', given.shape)}-{layers}"
    if not folder.exists():
        maker = [sys.executable, ROOT / "scripts" / "make_synthetic.py", "--shape", given.shape]
        subprocess.run([*maker, "--layers", str(layers), "--device", given.device, "--out", folder], check=True)
    return folder


def table(report: Report) -> str:
    """What was found, in Markdown."""
    about = report["machine"]
    lines = [f"{about['gpu']}, {about['cores']} cores, torch {about['torch']}, CUDA {about['cuda']}.", ""]
    lines += [f"Tests: {report['tests']['result']}", ""] if "tests" in report else []
    matrices = report.get("stages", {}).get("matrices", {})
    if matrices:
        labels = [label for label in next(iter(matrices.values())) if label != "solvers"]
        lines += ["Thread-seconds of each matrix of one layer:", ""]
        lines += ["| matrix | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
        for name, spent in matrices.items():
            short = name.split(".")[-2]
            lines.append(f"| `{short}` | " + " | ".join(f"{spent[label]:.2f}" for label in labels) + " |")
        lines.append("")
    for layers, found in report.get("pair", {}).items():
        if isinstance(found, dict):
            lines.append(
                f"`compare --device`, {layers}, nothing cached, the whole process: {found['compare_seconds']} s"
            )
    if "seconds_a_step" in report.get("train", {}):
        lines.append(f"GRPO from the embedded base: {report['train']['seconds_a_step']} s a step")
    for compute in ("float32", "bfloat16"):
        if compute in report.get("pretrained", {}):
            seconds = report["pretrained"][compute]["seconds_a_step"]
            lines.append(f"GRPO from the pretrained model, computed in {compute}: {seconds} s a step")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
