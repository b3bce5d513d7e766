"""Rules for LoRA's first learning rate, against each model's best rate of a sweep."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from autosft.profiles.recipe import Method
from autosft.studies.search.space import rule_learning_rate

#: NLL by (learning rate, rank).
Losses = dict[tuple[float, int], float]


def compare_rules(path: Path) -> None:
    """Print what each rule loses of NLL, averaged over models, and where it loses most.

    First to the best rate and rank of the model, with the rule's rate at its own best rank; then to the best
    rate at the same rank, averaged over ranks.
    """
    losses: dict[str, Losses] = defaultdict(dict)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        losses[row["model"]][row["learning_rate"], row["lora_rank"]] = row["test_nll"]
    rules: dict[str, Callable[[float], float]] = {
        "autosft": lambda size: rule_learning_rate(method=Method.LORA, num_parameters=round(size)),
        "constant 1e-4": lambda _: 1e-4,
        "constant 3e-4": lambda _: 3e-4,
        "constant 1e-3": lambda _: 1e-3,
        "2e-4 x sqrt(7e9 / N)": lambda size: min(2e-4 * math.sqrt(7e9 / size), 5e-3),
    }
    print(f"{len(losses)} models\n\n| rule | mean regret | worst | worst model | at the same rank |")
    print("|---|---|---|---|---|")
    for name, rule in rules.items():
        found = {model: regrets(of_model, rule(parameters(model))) for model, of_model in losses.items()}
        worst = max(found, key=lambda model: found[model][0])
        mean, same_rank = (statistics.fmean(each[at] for each in found.values()) for at in (0, 1))
        print(f"| {name} | {mean:.2%} | {found[worst][0]:.2%} | {worst} | {same_rank:.2%} |")


def regrets(losses: Losses, rate: float) -> tuple[float, float]:
    """Return a rate's loss of NLL to the model's best settings, and to the best rate at each rank.

    The rate is moved to the nearest that was tried; where it is missing at a rank, to the nearest there.
    """

    def nearest(rates: set[float]) -> float:
        return min(rates, key=lambda each: abs(math.log(each / rate)))

    ranks = {rank for _, rank in losses}
    here = nearest({each for each, _ in losses})
    over_all = min(loss for (each, _), loss in losses.items() if each == here) / min(losses.values()) - 1
    by_rank = []
    for rank in ranks:
        of_rank = {each: loss for (each, other), loss in losses.items() if other == rank}
        by_rank.append(of_rank[nearest(set(of_rank))] / min(of_rank.values()) - 1)
    return over_all, statistics.fmean(by_rank)


def parameters(model: str) -> float:
    """Return a model's number of parameters, from its name or for names that do not say."""
    known = {"DeepSeek-V3.1": 671e9, "Kimi": 1e12, "gpt-oss-20b": 21e9}
    for name, number in known.items():
        if name in model:
            return number
    found = re.search(r"(\d+(?:\.\d+)?)[bB]\b", model)
    return float(found[1]) * 1e9 if found else 30e9
