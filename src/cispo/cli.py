"""The command line, and the composition root: the only place that constructs other parts' collaborators.

    cispo train [RECIPE.yaml] [--section.field value ...]      cispo eval RUN_OR_RECIPE      cispo sample MODEL_OR_RUN

A mistake of the user's ends in one readable message and a non-zero status; `--debug` shows the traceback. Left out on
purpose: anything that computes.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from cispo import config as configs
from cispo.config import Config
from cispo.types import CispoError, ConfigError, DataError, LearnerLost, RunError

if TYPE_CHECKING:
    import contextlib

    from cispo.model import LoadedModel
    from cispo.trainer import Observer, Trainer
    from cispo.types import Learner, Sampler, Task

INTERRUPTED = 130
"""Exit status of a run that Ctrl-C ended, as a shell gives it."""

FREE_ON_RESUME = ("run_dir", "steps", "threads", "checkpoint", "track", "learner", "cluster", "vllm")
"""What may differ between a checkpoint's config and the one that resumes it, because no result so far depends on it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The `cispo` command. Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # libgomp's threads spin while they wait, by default for milliseconds. On a machine that does anything else, a small
    # model's steps then take many times as long; asleep at once, they take twice as long on an idle one. Some
    # microseconds of spinning cost little in both (a step of the default run on 2 cores, idle and beside a busy loop:
    # 0.27 s and over 2 s spinning, 0.55 s asleep when idle, 0.30 s and 0.66 s so). Torch reads it when it is imported,
    # which is later.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    console, errors = Console(), Console(stderr=True)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not words or words[0] in ("-h", "--help"):
        console.print(usage(), highlight=False, soft_wrap=True)
        return 0 if words else 2
    if words[0] == "--version":
        from cispo import __version__

        console.print(__version__)
        return 0
    if words[0] not in COMMANDS:
        errors.print(f"cispo: unknown command {words[0]!r}; the commands are {', '.join(COMMANDS)}")
        return 2
    try:
        return COMMANDS[words[0]].run(words[1:], console)
    except CispoError as error:
        if debug:
            raise
        errors.print(f"[bold red]cispo {words[0]}:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1 if isinstance(error, RunError | ArithmeticError) else 2
    except KeyboardInterrupt as stop:
        errors.print(f"cispo {words[0]}: {escape(str(stop)) or 'stopped'}", soft_wrap=True, highlight=False)
        return INTERRUPTED


# ------------------------------------------------------------------------------------------------------- composition


def build_task(config: Config, tokenizer: Any) -> Task:
    """The task that a config names. Raises DataError, ConfigError."""
    from cispo import tasks

    return tasks.build(config.task, tokenizer, seed=config.seed)


def model_path(config: Config, console: Console) -> str | Path:
    """Where the model is; the embedded base is made on first use, behind a progress bar."""
    if config.model.path is not None:
        return config.model.path
    from cispo.console import base_progress
    from cispo.tasks.think import base_model

    progress, callback = base_progress(console)
    started = False

    def show(*numbers: Any) -> None:
        nonlocal started
        if not started:
            progress.start()
            started = True
        callback(*numbers)

    try:
        return base_model(progress=show)
    finally:
        if started:
            progress.stop()


def check_prompts(config: Config, task: Task, context: int | None) -> None:
    """Every prompt with its completion must fit the model. Raises DataError."""
    limits = {"train": config.rollout.max_tokens, "eval": config.eval.max_tokens or config.rollout.max_tokens}
    for split, most in limits.items():
        if split == "eval" and not config.eval.every:
            continue
        for prompt in task.prompts(split):
            if context is not None and len(prompt.tokens) + most > context:
                raise DataError(
                    f"prompt {prompt.prompt_id}: {len(prompt.tokens)} tokens and rollout.max_tokens: {most} exceed the "
                    f"model's context of {context}; lower max_tokens, or set task.max_prompt_tokens and "
                    "task.overlong_prompts: drop"
                )


def compose(
    config: Config, run_dir: Path, observer: Observer, console: Console, task: Task | None = None
) -> tuple[Trainer, Callable[[], None]]:
    """A trainer with all its parts, and what closes them. Weights are loaded last, after all that can be checked."""
    import contextlib

    import torch

    from cispo import model as models
    from cispo import tasks
    from cispo.buffer import Buffer
    from cispo.metrics import open_trackers
    from cispo.rollout import PromptCursor, Rollouts
    from cispo.trainer import Trainer

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif config.asynchrony.place == "process" and config.cluster.kind == "none" and config.learner.endpoint is None:
        # Threads of two processes on the same cores wait for each other at every barrier.
        torch.set_num_threads(max(1, torch.get_num_threads() - config.asynchrony.sampler_threads))
    torch.manual_seed(config.seed)
    if task is None:
        tasks.check(config.task)
    path = model_path(config, console)
    models.check_folder(path)
    tokenizer = models.load_tokenizer(path)
    task = task or build_task(config, tokenizer)
    check_prompts(config, task, models.context_length(models.load_config(path)))
    with contextlib.ExitStack() as stack:
        learner, sampler, task = build_machines(config, path, task, stack)
        trackers = open_trackers(config.track, run_dir, config.model_dump(mode="json", by_alias=True))
        for tracker in trackers:
            stack.callback(tracker.close)
        rollouts = Rollouts(
            config=config.rollout,
            asynchrony=config.asynchrony,
            task=task,
            sampler=sampler,
            tokenizer=tokenizer,
            buffer=Buffer(config.rollout.groups_per_step, config.asynchrony.max_staleness),
            cursor=PromptCursor(task.prompts("train"), config.seed, config.rollout.pass_rate_ceiling),
            seed=config.seed,
        )
        stack.callback(rollouts.close)
        trainer = Trainer(
            config=config,
            run_dir=run_dir,
            learner=learner,
            sampler=sampler,
            task=task,
            rollouts=rollouts,
            tokenizer=tokenizer,
            observer=observer,
            trackers=trackers,
            teacher=build_teacher(config, path),
        )
        keep = stack.pop_all()
    return trainer, keep.close


def build_machines(
    config: Config, path: str | Path, task: Task, stack: contextlib.ExitStack
) -> tuple[Learner, Sampler, Task]:
    """Who trains and who samples, here or on a cluster; what must be closed goes onto the stack."""
    import torch

    from cispo import model as models
    from cispo.learner import LocalLearner

    if config.learner.endpoint is not None:
        from cispo.server.remote import connect

        base_model = config.learner.endpoint_model or config.model.path or "think"
        rank = config.model.lora.rank if config.model.lora else 32
        learner, sampler = connect(config.learner.endpoint, base_model=base_model, rank=rank, seed=config.seed)
        return learner, sampler, task
    if config.cluster.kind != "none":
        from cispo import cluster

        parts = cluster.compose(config, path, task)
        stack.callback(parts.close)
        return parts.learner, parts.sampler or build_sampler(config, path, None, parts.learner, stack), parts.task
    loaded = models.load(config.model, path)
    reference = None
    if config.algorithm.kl is not None and config.model.lora is None:
        reference = models.load(config.model, path, trainable=False).model
    learner = LocalLearner(
        loaded,
        config.learner,
        head_dtype=torch.float32 if config.model.head_dtype == "float32" else None,
        reference=reference,
    )
    return learner, build_sampler(config, path, loaded, learner, stack), task


def build_teacher(config: Config, path: str | Path) -> Learner | None:
    """The frozen model of `algorithm.distillation`. Raises ConfigError where its vocabulary is another."""
    from cispo import model as models
    from cispo.learner import LocalLearner

    if config.algorithm.distillation is None:
        return None
    teacher = config.algorithm.distillation.teacher
    sizes = [models.load_config(p).get_text_config().vocab_size for p in (path, teacher)]
    if sizes[0] != sizes[1] or models.load_tokenizer(path).get_vocab() != models.load_tokenizer(teacher).get_vocab():
        raise ConfigError(
            f"algorithm.distillation.teacher: {teacher} has another vocabulary than the policy; use one that shares it"
        )
    settings = config.model.model_copy(update={"lora": None})
    return LocalLearner(models.load(settings, teacher, trainable=False), config.learner)


def build_sampler(
    config: Config, path: str | Path, loaded: LoadedModel | None, learner: Learner, stack: contextlib.ExitStack
) -> Sampler:
    """In turn with the learner and on its weights (`loaded`), beside it in a process of its own, or vLLM."""
    import torch

    from cispo import model as models
    from cispo.sampling.local import LocalSampler
    from cispo.sampling.process import ProcessOptions, ProcessSampler

    asynchrony = config.asynchrony
    options = {
        "max_batch_rows": config.rollout.max_batch_rows,
        "recompute_kv_on_update": asynchrony.recompute_kv,
    }
    place = asynchrony.place
    if place == "inline" and loaded is not None:
        eos = models.eos_token_ids(loaded.model, loaded.tokenizer)
        return LocalSampler(loaded.model, loaded.tokenizer, eos_token_ids=eos, **options)
    if place == "vllm":
        from cispo.sampling.probe import learner_logprobs
        from cispo.sampling.vllm import VllmSampler

        sampler = VllmSampler(
            path,
            config.vllm,
            reference=learner_logprobs(learner),
            dtype=None if config.model.dtype == "auto" else getattr(torch, config.model.dtype),
            tokenizer=models.load_tokenizer(path),
            in_flight=asynchrony.in_flight_weight_updates,
            recompute_kv=asynchrony.recompute_kv,
            threads=asynchrony.sampler_threads,
            seed=config.seed,
        )
        stack.callback(sampler.close)
        # A server's weights are whatever it was left with, and the first probe should come before the first rollout.
        sampler.update_weights(learner.weights(), sampler.version)
        return sampler
    sampler = ProcessSampler(
        ProcessOptions(
            path=path,
            model=config.model,
            sampler=options,
            threads=asynchrony.sampler_threads,
            drain=not asynchrony.in_flight_weight_updates,
            timeout_s=asynchrony.sampler_timeout_s,
        )
    )
    stack.callback(sampler.close)
    return sampler


def cluster_follower(config: Config, console: Console) -> bool:
    """Whether this process is a rank that only follows the first; if so, it has followed to the end."""
    if config.cluster.kind != "torchrun":
        return False
    from cispo import cluster

    if not cluster.follows(config):
        return False
    cluster.follow(config, model_path(config, console))
    return True


def new_run_dir(config: Config) -> Path:
    """Where the run goes. Raises ConfigError where something is already, or nothing could be written."""
    run_dir = Path(config.run_dir or f"runs/{config.task.type}-{time.strftime('%Y%m%d-%H%M%S')}")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise ConfigError(
            f"run_dir: {run_dir} exists and is not empty; go on with cispo train --resume {run_dir}, or choose another"
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir: {run_dir} is a file; choose another name")
    check_writable(run_dir)
    return run_dir


def check_writable(run_dir: Path) -> None:
    """Raises ConfigError where the folder could not be made."""
    parent = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"run_dir: {run_dir} cannot be made, because {parent} is no folder that can be written")


def train(
    config: Config | None = None, *, task: Task | None = None, resume: bool = False, console: Console | None = None
) -> Path:
    """Train as `config` says (the embedded default without one) and return the run's folder.

    task: one of your own, in place of `config.task`. resume: go on in `config.run_dir` from its newest checkpoint.
    Raises the errors of `cispo.types`.
    """
    from cispo import checkpoint
    from cispo.console import Screen, summary

    config = config or configs.load()
    console = console or Console(stderr=True)
    if resume and not config.run_dir:
        raise ConfigError("run_dir: missing; resuming needs the folder of the run")
    if cluster_follower(config, console):
        return Path(config.run_dir or "")
    run_dir = Path(config.run_dir) if resume else new_run_dir(config)
    folder = checkpoint.latest(run_dir) if resume else None
    if folder is not None:
        check_same(config, run_dir)
    for warning in configs.warnings(config):
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True, highlight=False)
    screen = Screen(console, steps=config.steps, thinks=config.task.type == "think")
    for restarts_left in reversed(range(config.cluster.max_learner_restarts + 1)):
        trainer, close = compose(config, run_dir, screen, console, task)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            text = configs.to_yaml(config.model_copy(update={"run_dir": str(run_dir)}))
            (run_dir / ".config.yaml").write_text(text)
            (run_dir / ".config.yaml").rename(run_dir / "config.yaml")
            if folder is not None:
                trainer.resume(folder)
                console.print(f"resuming {run_dir} after step {trainer.step}", soft_wrap=True, highlight=False)
            with screen.showing():
                finished = trainer.run()
            break
        except LearnerLost as lost:
            found = checkpoint.complete(run_dir)
            if not restarts_left or not found:
                raise
            folder = found[-1]
            console.print(f"[yellow]warning:[/] {escape(str(lost))}", soft_wrap=True, highlight=False)
        finally:
            close()
    page = write_report(run_dir, console)
    if not finished:
        raise Interrupted(f"stopped after step {trainer.step} and saved; go on with: cispo train --resume {run_dir}")
    summary(
        console,
        run_dir=run_dir,
        before=trainer.before,
        after=trainer.after,
        first_eval=trainer.first_eval,
        last_eval=trainer.last_eval,
        next_steps=next_steps(config, run_dir, page),
    )
    return run_dir


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the run was saved. The message says how to resume."""


def write_report(run_dir: Path, console: Console) -> Path | None:
    """The run's page. A report that cannot be written must not cost the run, so it is said and passed over."""
    from cispo.report.page import write_page
    from cispo.report.runs import find_runs

    try:
        return write_page(run_dir / "report.html", find_runs([run_dir]))
    except (CispoError, OSError) as error:
        console.print(f"[yellow]warning:[/] no report was written: {escape(str(error))}", soft_wrap=True)
        return None


def next_steps(config: Config, run_dir: Path, page: Path | None) -> list[str]:
    """What to try after a run."""
    lines = [f"look at it         open {page} in a browser"] if page else []
    lines += [
        f"talk to it         cispo sample {run_dir}",
        f"evaluate it        cispo eval {run_dir}",
    ]
    if config.task.type == "think":
        lines += [
            "compare with GRPO  cispo train --algorithm.objective.type ppo_clip",
            "your own data      cispo train recipes/jsonl-math.yaml --model.path MODEL --task.path DATA.jsonl",
        ]
    return lines


def check_same(config: Config, run_dir: Path) -> None:
    """A checkpoint may only be resumed under the config that made it. Raises ConfigError naming what differs."""
    stored = configs.flatten(configs.read_yaml(run_dir / "config.yaml"))
    wanted = configs.flatten(config.model_dump(mode="json", by_alias=True))
    free = FREE_ON_RESUME if config.optimizer.schedule == "constant" else tuple(set(FREE_ON_RESUME) - {"steps"})
    differing = [
        f"  {key}: the run has {stored.get(key)!r}, now {wanted.get(key)!r}"
        for key in dict.fromkeys([*stored, *wanted])
        if stored.get(key) != wanted.get(key) and key.partition(".")[0] not in free
    ]
    if differing:
        raise ConfigError(
            f"{run_dir}: its checkpoints are of another config; drop these changes, or start another run\n"
            + "\n".join(differing)
        )


# ---------------------------------------------------------------------------------------------------------- commands


def run_train(words: list[str], console: Console) -> int:
    if "--help" in words or "-h" in words:
        help_for_config("cispo train", [w for w in words if w not in ("-h", "--help")])
        return 0
    rest, tiny_wanted = _without(words, "--tiny")
    system, rest = _option(rest, "--like")
    if system is not None:
        from cispo import dialects

        translation = dialects.translate(system, rest)
        for warning in translation.warnings:
            console.print(f"[yellow]{system}:[/] {escape(warning)}", soft_wrap=True, highlight=False)
        train(dialects.tiny(translation.config) if tiny_wanted else translation.config, console=console)
        return 0
    recipe, resume = None, None
    if rest and not rest[0].startswith("--"):
        recipe = rest.pop(0)
    if "--resume" in rest:
        at = rest.index("--resume")
        rest.pop(at)
        resume = rest.pop(at) if at < len(rest) and not rest[at].startswith("--") else ""
    elif any(word.startswith("--resume=") for word in rest):
        resume, rest = _option(rest, "--resume")
    if resume and recipe is None:
        recipe = str(Path(resume) / "config.yaml")
        if not Path(recipe).is_file():
            raise ConfigError(f"--resume {resume}: holds no run (there is no config.yaml)")
    if resume:
        rest += ["--run_dir", resume]
    if tiny_wanted:
        from cispo import dialects

        config = configs.override(dialects.tiny(configs.load(recipe)), rest)
    else:
        config = configs.load(recipe, rest)
    train(config, resume=resume is not None, console=console)
    return 0


def run_explain(words: list[str], console: Console) -> int:
    """`cispo explain [RECIPE.yaml | --like SYSTEM ...] [--format text|yaml|json] [overrides]`."""
    from cispo import dialects

    if "--help" in words or "-h" in words:
        console.print(
            "usage: cispo explain [RECIPE.yaml] [--section.field value ...] [--format text|yaml|json]\n"
            f"       cispo explain --like SYSTEM ...    SYSTEM is one of {', '.join(dialects.SYSTEMS)}\n\n"
            "Prints the config that a recipe or another system's settings come to, the band of the importance weight,\n"
            "where each number came from, what has no meaning here, and warnings.",
            highlight=False,
            markup=False,
        )
        return 0
    form, rest = _option(words, "--format")
    if form not in (None, "text", "yaml", "json"):
        raise ConfigError(f"--format {form}: choose from text, yaml, json")
    system, rest = _option(rest, "--like")
    rest, tiny_wanted = _without(rest, "--tiny")
    if system is not None:
        translation = dialects.translate(system, rest)
    else:
        recipe = rest.pop(0) if rest and not rest[0].startswith("--") else None
        raw = configs.merge(recipe, rest)
        translation = dialects.of_config(configs.validate(raw, source=recipe or "the command line"), raw)
    if tiny_wanted:
        small = dialects.tiny(translation.config)
        translation = dialects.of_config(small, small.model_dump(mode="json", by_alias=True))
    if form in (None, "text"):
        dialects.show(translation, console)
    else:
        sys.stdout.write(dialects.explain(translation, form))
    return 0


def _option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name value` or `--name=value`, and the other words."""
    rest = list(words)
    for at, word in enumerate(rest):
        if word == name:
            if at + 1 == len(rest):
                raise ConfigError(f"{name}: needs a value")
            return rest[at + 1], rest[:at] + rest[at + 2 :]
        if word.startswith(name + "="):
            return word.partition("=")[2], rest[:at] + rest[at + 1 :]
    return None, rest


def _without(words: Sequence[str], flag: str) -> tuple[list[str], bool]:
    return [word for word in words if word != flag], flag in words


def help_for_config(prog: str, words: list[str]) -> None:
    """The whole config as flags, with the defaults of the recipe that is named."""
    recipe = words[0] if words and not words[0].startswith("--") else None
    default = configs.load(recipe, words[1:] if recipe else words)
    tyro.cli(
        Config,
        prog=prog,
        default=default,
        args=["--help"],
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        description=(
            f"{prog} [RECIPE.yaml] [--resume RUN] [--section.field value ...]\n\nWithout a recipe: the embedded "
            "default, the task `think`. Values are read as YAML. Another variant of a section is chosen by its "
            "type, such as --algorithm.objective.type ppo_clip or --task.type jsonl."
        ),
    )


def run_eval(words: list[str], console: Console) -> int:
    import torch

    from cispo import model as models
    from cispo.buffer import Buffer
    from cispo.rollout import PromptCursor, Rollouts
    from cispo.sampling.local import LocalSampler
    from cispo.trainer import eval_params

    if "--help" in words or "-h" in words:
        help_for_config("cispo eval", [w for w in words if w not in ("-h", "--help")])
        return 0
    rest = list(words)
    what = rest.pop(0) if rest and not rest[0].startswith("--") else None
    config, path = resolve_model(what, rest, console)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    task = build_task(config, models.load_tokenizer(path))
    prompts = task.prompts("eval")[: config.eval.max_prompts]
    if not prompts:
        raise ConfigError(
            "task: has no held-out prompts; give it an evaluation set (eval_path, eval_split, eval_fraction)"
        )
    loaded = models.load(config.model.model_copy(update={"lora": None}), path, trainable=False)
    sampler = LocalSampler(
        loaded.model,
        loaded.tokenizer,
        max_batch_rows=config.rollout.max_batch_rows,
        eos_token_ids=models.eos_token_ids(loaded.model, loaded.tokenizer),
    )
    rollouts = Rollouts(
        config=config.rollout,
        asynchrony=config.asynchrony,
        task=task,
        sampler=sampler,
        tokenizer=loaded.tokenizer,
        buffer=Buffer(config.rollout.groups_per_step, 0),
        cursor=PromptCursor(task.prompts("train"), config.seed),
        seed=config.seed,
    )
    try:
        with console.status(f"evaluating {len(prompts)} prompts"):
            evaluation = rollouts.evaluate(
                prompts,
                eval_params(config),
                config.eval.samples_per_prompt,
                config.seed,
                watchdog_s=config.asynchrony.watchdog_s,
            )
    finally:
        rollouts.close()
    console.print(f"{'model':<24} {path}", soft_wrap=True, highlight=False)
    console.print(f"{'prompts × samples':<24} {len(prompts)} × {config.eval.samples_per_prompt}", highlight=False)
    for name, value in evaluation.metrics().items():
        console.print(f"{name.removeprefix('eval/'):<24} {value:.4f}", highlight=False)
    return 0


def resolve_model(what: str | None, overrides: Sequence[str], console: Console) -> tuple[Config, str | Path]:
    """The config and the model folder that a run, a recipe or nothing stands for."""
    from cispo import checkpoint

    if what is not None and Path(what).is_dir():
        if not (Path(what) / "config.yaml").is_file():
            raise DataError(f"{what}: holds no run (there is no config.yaml)")
        return configs.load(Path(what) / "config.yaml", overrides), checkpoint.latest(Path(what)) / "model"
    config = configs.load(what, overrides)
    return config, model_path(config, console)


@dataclass
class SampleOptions:
    """Talk to a model folder, a hub id, or a run's newest checkpoint; nothing means the embedded base model."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    prompt: str | None = None
    """One prompt; without it, a conversation (Ctrl-D ends it)."""
    n: int = 1
    """Completions of the prompt."""
    temperature: float = 1.0
    max_tokens: int = 256
    top_p: float = 1.0
    seed: int | None = None
    system: str | None = None
    raw: bool = False
    """Continue the text as it stands, without the chat template."""


def run_sample(words: list[str], console: Console) -> int:
    from cispo import checkpoint
    from cispo import model as models
    from cispo.config import ModelConfig
    from cispo.sampling.local import LocalSampler
    from cispo.types import SamplingParams

    options = tyro.cli(SampleOptions, prog="cispo sample", args=words, use_underscores=True)
    path: str | Path
    if options.model is None:
        path = model_path(Config(), console)
    elif (Path(options.model) / "config.yaml").is_file():
        path = checkpoint.latest(Path(options.model)) / "model"
    else:
        path = options.model
    loaded = models.load(ModelConfig(), path, trainable=False)
    sampler = LocalSampler(
        loaded.model, loaded.tokenizer, eos_token_ids=models.eos_token_ids(loaded.model, loaded.tokenizer)
    )
    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )
    chat = Conversation(loaded, sampler, params, system=options.system, raw=options.raw)
    if options.prompt is not None:
        for text in chat.reply(options.prompt, options.n):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        return 0
    console.print(f"{path}: type a prompt; Ctrl-D ends", markup=False, highlight=False, soft_wrap=True)
    while True:
        try:
            prompt = console.input("[bold]> [/]")
        except EOFError:
            return 0
        for text in chat.reply(prompt, options.n):
            console.print(text, markup=False, highlight=False, soft_wrap=True)


class Conversation:
    """Turns of a chat where the tokenizer has a chat template; else each prompt is continued on its own."""

    def __init__(self, loaded: LoadedModel, sampler: Any, params: Any, *, system: str | None, raw: bool) -> None:
        self._tokenizer, self._sampler, self._params = loaded.tokenizer, sampler, params
        self._context = loaded.context_length
        self._chat = not raw and bool(getattr(loaded.tokenizer, "chat_template", None))
        self._turns = [{"role": "system", "content": system}] if system else []
        if system and not self._chat:
            raise ConfigError("system: this tokenizer has no chat template to put it in")

    def reply(self, prompt: str, samples: int = 1) -> list[str]:
        from dataclasses import replace

        from cispo.types import SampleRequest

        if self._chat:
            self._turns.append({"role": "user", "content": prompt})
            tokens = self._tokenizer.apply_chat_template(self._turns, add_generation_prompt=True, return_dict=False)
        else:
            tokens = self._tokenizer.encode(prompt)
        if not tokens:
            raise DataError("prompt: is empty")
        params = self._params
        if self._context is not None and len(tokens) + params.max_tokens > self._context:
            params = replace(params, max_tokens=max(1, self._context - len(tokens)))
        (result,) = self._sampler.sample([SampleRequest(0, tuple(tokens), samples, params)])
        texts = self._tokenizer.batch_decode([list(c.tokens) for c in result.completions], skip_special_tokens=True)
        if self._chat:
            self._turns.append({"role": "assistant", "content": texts[0]})
        return texts


@dataclass
class ExportOptions:
    """Write a run's newest checkpoint as an ordinary transformers folder."""

    run: Annotated[str, tyro.conf.Positional]
    folder: Annotated[str, tyro.conf.Positional]
    adapter: bool = False
    """With LoRA: write the adapter folder instead of merged weights."""


def run_export(words: list[str], console: Console) -> int:
    from cispo import checkpoint
    from cispo import model as models

    options = tyro.cli(ExportOptions, prog="cispo export", args=words, use_underscores=True)
    target = Path(options.folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"folder: {target} exists and is not empty; choose another")
    config, _ = resolve_model(options.run, [], console)
    folder = checkpoint.latest(Path(options.run))
    loaded = models.load(config.model, model_path(config, console))
    from cispo.learner import LocalLearner

    learner = LocalLearner(loaded)
    learner.load(folder)
    learner.export(target, merge=not options.adapter)
    console.print(f"{folder.name} of {options.run} is in {target}", soft_wrap=True, highlight=False)
    return 0


def door(module: str, options: str, function: str, name: str) -> Callable[[list[str], Console], int]:
    """A command that lives in its own room: its options are parsed by tyro, its function gives the exit status."""

    def run(words: list[str], console: Console) -> int:
        room = import_module(module)
        if name == "serve":
            words = with_values(words, ("--status",))
        parsed = tyro.cli(
            getattr(room, options), prog=f"cispo {name}", args=words, use_underscores=True,
            config=(tyro.conf.FlagConversionOff,) if name == "serve" else (),
        )  # fmt: skip
        return getattr(room, function)(parsed)

    return run


def with_values(words: list[str], flags: Sequence[str]) -> list[str]:
    """`--flag` alone means `--flag True`, as everywhere else; tyro wants the value where flags are not converted."""
    out = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        out += [word, "True"] if word in flags and following.startswith("-") else [word]
    return out


def run_bench(words: list[str], console: Console) -> int:
    from cispo import bench

    names = ", ".join(bench.BENCHES)
    if not words or words[0] in ("-h", "--help"):
        console.print(f"usage: cispo bench NAME ...   NAME is one of {names}; cispo bench NAME --help says more")
        return 0 if words else 2
    if words[0] not in bench.BENCHES:
        raise ConfigError(f"bench {words[0]}: unknown; choose from {names}")
    options, run = bench.load(words[0])
    return run(tyro.cli(options, prog=f"cispo bench {words[0]}", args=words[1:], use_underscores=True))


@dataclass(frozen=True)
class Command:
    """One command: what it is for, and what runs it."""

    help: str
    run: Callable[[list[str], Console], int]


COMMANDS: dict[str, Command] = {
    "train": Command("train a model; without arguments, the embedded default", run_train),
    "explain": Command("what a recipe, or another system's settings, mean here", run_explain),
    "eval": Command("held-out accuracy of a run or a recipe's model", run_eval),
    "sample": Command("talk to a model or a run's newest checkpoint", run_sample),
    "export": Command("write a run's checkpoint as a transformers folder", run_export),
    "report": Command(
        "one HTML file about one run or several", door("cispo.report.page", "ReportOptions", "report", "report")
    ),
    "fit": Command("forecast held-out reward over compute", door("cispo.report.forecast", "FitOptions", "fit", "fit")),
    "compare": Command(
        "recipes against each other on paired seeds",
        door("cispo.report.compare", "CompareOptions", "compare", "compare"),
    ),
    "watch": Command(
        "a run while it goes: a live page, or --tui", door("cispo.report.watch", "WatchOptions", "watch", "watch")
    ),
    "bench": Command("benchmarks against the alternatives", run_bench),
    "plan": Command(
        "memory, transfer and time of a recipe, by arithmetic", door("cispo.plan", "PlanOptions", "plan", "plan")
    ),
    "check": Command(
        "bounds on a run's metrics, for nightly jobs", door("cispo.check", "CheckOptions", "check", "check")
    ),
    "serve": Command("the Tinker API on this machine", door("cispo.server", "ServeOptions", "serve", "serve")),
}


def usage() -> str:
    lines = ["usage: cispo COMMAND ...   (cispo COMMAND --help says more; --debug shows tracebacks)", ""]
    lines += [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(lines)
