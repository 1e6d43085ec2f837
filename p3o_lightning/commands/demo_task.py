"""The demo's generated task: short reviews with a known right answer, so that what the policy optimises can be held against the truth.

A gold score reads a small lexicon. People's choices are drawn from it with noise; the reward model sees only the choices. Because
the gold is known, the reward that was learned (the proxy) and the reward that was meant (the gold) are both visible.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

GOOD = ["great", "lovely", "fresh", "friendly", "charming", "superb", "cozy", "bright", "tasty", "quiet", "elegant", "generous"]
BAD = ["awful", "dirty", "rude", "noisy", "bland", "broken", "stale", "cramped", "slow", "gloomy"]
NEUTRAL = ["plain", "small", "large", "old", "modern", "busy", "simple", "average", "wooden", "local"]
PLACES = ["hotel", "cafe", "museum", "bar", "bakery", "market", "theatre", "library", "garden", "hostel"]
NEAR = ["station", "river", "harbour", "park", "bridge", "square", "tower", "beach"]
WHEN = ["spring", "summer", "autumn", "winter"]
TOPICS = ["room", "food", "staff", "music", "view", "service", "coffee", "bread", "light", "seat", "price", "door"]
HEDGES = ["very", "quite", "rather", "truly"]
OTHERS = ["review", "of", "the", "near", "in", ":", ",", "and", "but", "was", ".", "<unk>"]
VOCABULARY = sorted({*GOOD, *BAD, *NEUTRAL, *PLACES, *NEAR, *WHEN, *TOPICS, *HEDGES, *OTHERS})

WORD_VALUE = 0.3  # gold units for each different good word, and against each bad one
CEILING = 1.2  # a text of four or more different good words and nothing else reaches it
REPEAT_COST = 0.3  # for every word of the lexicon said again


class Pair(NamedTuple):
    """A prompt with two reviews; the first one was chosen."""

    prompt: str
    chosen: str
    rejected: str


def gold_score(review: str) -> float:
    """What the raters really want: different good words, no bad ones, nothing twice. About 0.2 for the corpus, at most 1.2.

    >>> gold_score("the room was great and the food was lovely .")
    0.6
    >>> gold_score("the room was great and the room was great .")  # said twice
    0.0
    """
    words = [word for word in review.split() if word in _LEXICON]
    good = len({word for word in words if word in GOOD})
    bad = sum(word in BAD for word in words)
    repeats = len(words) - len(set(words))
    return round(min(good * WORD_VALUE, CEILING) - bad * WORD_VALUE - repeats * REPEAT_COST, 6)


_LEXICON = {*GOOD, *BAD}


def gold(completions: list[str], **_: Any) -> list[float]:
    """`gold_score` as a reward source, of weight 0: on the dashboard beside the learned reward, and never trained on."""
    return [gold_score(review) for review in completions]


def prompt_shift(prompts: list[str], **_: Any) -> list[float]:
    """A reward that says nothing: delta(x), a standard normal number for each prompt, the same for all responses to it."""
    return [random.Random(f"shift of {prompt}").gauss(0, 1) for prompt in prompts]


def prompts() -> list[str]:
    """Every prompt of the task, in a fixed order."""
    return [f"review of the {place} near the {near} in {when} :" for place in PLACES for near in NEAR for when in WHEN]


def review(rng: random.Random) -> str:
    """One review as people write them: two to four clauses, mixed words, now and then the same one again."""
    clauses: list[str] = []
    used: list[str] = []
    for topic in rng.sample(TOPICS, rng.choice((2, 3, 3, 4))):
        again = used and rng.random() < 0.15
        adjective = rng.choice(used if again else rng.choices((GOOD, BAD, NEUTRAL), (0.46, 0.2, 0.34))[0])
        hedge = rng.choice(HEDGES) + " " if rng.random() < 0.3 else ""
        clauses.append(f"the {topic} was {hedge}{adjective}")
        used.append(adjective)
    text = clauses[0]
    for clause in clauses[1:]:
        text += rng.choice((" , ", " and ", " but ")) + clause
    return f" {text} ."


def preferences(count: int, rng: random.Random, sharpness: float = 6.0) -> list[Pair]:
    """Noisy choices between two reviews of one prompt: P(first) = sigmoid(sharpness x gold gap)."""
    everything = prompts()
    pairs = []
    for _ in range(count):
        prompt, first, second = rng.choice(everything), review(rng), review(rng)
        wins = rng.random() < 1 / (1 + math.exp(-sharpness * (gold_score(first) - gold_score(second))))
        pairs.append(Pair(prompt, first, second) if wins else Pair(prompt, second, first))
    return pairs


def write_task(folder: Path, seed: int, demonstrations: int = 3000, pairs: int = 4000) -> None:
    """Write `demonstrations.jsonl`, `preferences.jsonl`, `prompts.jsonl` and `tokenizer/` into the folder."""
    rng = random.Random(seed)
    everything = prompts()
    _write(folder / "demonstrations.jsonl", [{"prompt": rng.choice(everything), "completion": review(rng)} for _ in range(demonstrations)])
    _write(folder / "preferences.jsonl", [pair._asdict() for pair in preferences(pairs, rng)])
    _write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in everything])
    write_tokenizer(folder / "tokenizer")


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *VOCABULARY]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)
