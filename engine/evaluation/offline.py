"""Asks an engine in this process, greedily, through the checkpoint's own chat template."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.evaluation.report import Outcome
from engine.llm import LLM
from engine.request import SamplingParams
from engine.tiny.skills.example import Example
from engine.tiny.skills.rendering import prompt_text


def ask_engine(llm: LLM, examples: Sequence[Example], *, max_tokens: int, tell: Callable[[str], None]) -> list[Outcome]:
    """An outcome per example, in their order (of each skill together). A prompt that the model refuses is an error."""
    outcomes: list[Outcome] = []
    for skill, group in itertools.groupby(examples, key=lambda example: example.skill):
        tell(skill)
        outcomes += _ask(llm, list(group), SamplingParams(temperature=0.0, max_tokens=max_tokens))
    return outcomes


def measured_lines(folder: Path, examples: Sequence[Example]) -> Iterator[str]:
    """How evenly the experts of a small MoE checkpoint are used, and how often its MTP block agrees: for people.

    Raises ValueError for a checkpoint that the training code cannot read.
    """
    # only here: it takes the model that training uses
    from engine.tiny.training.measures import expert_histogram, mtp_agreement

    try:
        histogram = expert_histogram(folder, examples)
        agreement = mtp_agreement(folder, examples)
    except (LookupError, OSError) as error:
        raise ValueError(f"{folder} can't be measured, it is not as engine.tiny.train writes them: {error}") from error
    yield "experts' load as a multiple of the fair share, by MoE layer:"
    for layer, shares in enumerate(histogram):
        yield f"  {layer}: " + " ".join(f"{share * len(shares):.2f}" for share in shares)
    loads = [share * len(shares) for shares in histogram for share in shares]
    yield f"  least {min(loads):.2f}, most {max(loads):.2f}"
    yield f"MTP: second next token agrees in {agreement:.1%} of the places"


def _ask(llm: LLM, examples: list[Example], params: SamplingParams) -> list[Outcome]:
    prompts: dict[int, list[int]] = {}
    errors: dict[int, str] = {}
    for index, example in enumerate(examples):
        try:
            text = prompt_text(example, llm.tokenizer.template)
            prompts[index] = llm.tokenizer.encode(text, add_special_tokens=False)
        except ValueError as error:
            errors[index] = str(error)
    answers = dict(zip(prompts, _generate(llm, list(prompts.values()), params), strict=True))
    return [
        Outcome(example, *answers[index]) if index in answers else Outcome(example, error=errors[index])
        for index, example in enumerate(examples)
    ]


def _generate(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[tuple[str, str]]:
    """(text, error) of each. They run together; where one of them is refused (too long), each by itself."""
    try:
        return [(output.outputs.text, "") for output in llm.generate(prompts, params)] if prompts else []
    except ValueError as error:
        if len(prompts) == 1:
            return [("", str(error))]
        return [answer for prompt in prompts for answer in _generate(llm, [prompt], params)]
