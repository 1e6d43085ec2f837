"""The dashboard in a real browser: every tab loads, what was written is there, and no markup of a stranger's text is executed."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from p3o_lightning import PreferenceDataModule, RewardModel
from p3o_lightning.callbacks import Dashboard, FrontierPath, Reliability, RewardGap, SampleTable
from tests.browser import ALL, CHROMIUM, Browser, tensorboard
from tests.tiny import LLAMA, letters, policy, preferences, prompts, share_of_a, trainer

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")]

HOSTILE = [
    "<script>hacked('script')</script>",
    "<img src=x onerror=\"hacked('img')\">",
    "<svg onload=\"hacked('svg')\"></svg>",
    "</td></tr></table><iframe srcdoc=\"<script>parent.hacked('iframe')</script>\"></iframe>",
    "[click](javascript:hacked('link'))",
    "<javascript:hacked('autolink')>",
    "![picture](http://127.0.0.1:9/picture.png)",
    "[reference]: javascript:hacked('reference')\n\n[reference]",
    "<a href=\"javascript:hacked('a')\">here</a> | cell | `code` **bold**",
]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """A TensorBoard over a policy whose responses are hostile, and a reward model."""
    root = tmp_path_factory.mktemp("runs")
    module = policy(reward_funcs=[share_of_a, share_of_b], reward_weights=[1.0, 0.0], num_iterations=2, max_completion_length=4)
    module.hparams["note"] = HOSTILE[1]
    genuine, turn = module.tokenizer.decode, iter(range(10**9))
    board = TensorBoardLogger(root, name="policy", version=0, default_hp_metric=False)
    callbacks = [Dashboard(), SampleTable(every_n_steps=2, rows=4), RewardGap(every_n_steps=2), FrontierPath()]
    run = trainer(root, callbacks=callbacks, logger=board, max_steps=6, log_every_n_steps=1, val_check_interval=2, limit_val_batches=1)

    class Hostile:
        """Decodes every response of the table as the next hostile text."""

        def __getattr__(self, name):
            return getattr(module.tokenizer, name)

        def decode(self, *_, **__):
            return HOSTILE[next(turn) % len(HOSTILE)]

    table = callbacks[1].table
    callbacks[1].table = lambda _, prompts, experience, extra: table(
        Hostile(), prompts._replace(prompts=[HOSTILE[0], *prompts.prompts[1:]]), experience
    )
    run.fit(module, module.wrap_train_dataloader(prompts()), prompts())
    assert module.tokenizer.decode == genuine

    board = TensorBoardLogger(root, name="reward", version=0, default_hp_metric=False)
    judge = RewardModel(LLAMA, tokenizer=letters(), lr=1e-2)
    data = PreferenceDataModule(str(preferences(root, 32)), batch_size=8, val_fraction=0.25)
    trainer(root, callbacks=[Dashboard(), Reliability()], logger=board, max_epochs=2, log_every_n_steps=1).fit(judge, data)
    return tensorboard(root)


def share_of_b(completions, **_):
    return [text.count("b") / max(len(text), 1) for text in completions]


share_of_b.__name__ = "<img src=x onerror=hacked('tag')>"  # a name becomes a tag


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        opened.call("Page.addScriptToEvaluateOnNewDocument", source="window.hacks = []; window.hacked = by => { window.hacks.push(by); };")
        yield opened
        assert opened.complaints == []


@pytest.fixture
def page(browser, address):
    """Opens a tab; after the test, nothing hostile has run there."""

    def go(tab: str, *wanted: str) -> str:
        browser.open(f"{address}#{tab}", 1400, 2400)
        return browser.wait_for_text(*wanted)

    yield go
    browser.rest(0.5)
    assert browser.run("window.hacks") == [] and browser.dialogs == [] and browser.complaints == []


@pytest.mark.parametrize(
    ("tab", "wanted"),
    [
        ("timeseries", ["objective", "p3o", "completions", "kl_reward_path", "histograms"]),
        ("scalars", ["completions", "objective", "p3o", "rewards"]),
        ("custom_scalars", ["1. Is it learning?", "2. Is it safe?", "3. Is it consistent?", "4. Is it fast?", "KL to the reference, nats"]),
        ("images", ["kl_reward_path", "reliability"]),
        ("histograms", ["histograms/q", "histograms/ratio", "histograms/length"]),
        ("distributions", ["histograms/q", "histograms/ratio", "histograms/length"]),
        ("text", ["samples", "best response"]),
        ("hparams", ["policy/version_0", "reward/version_0", "model/kl_coef"]),
    ],
)
def test_every_tab_loads(page, tab, wanted):
    page(tab, *wanted)


def test_a_chart_of_the_layout_is_drawn(page, browser):
    page("custom_scalars", "1. Is it learning?", "each reward source")
    browser.wait(f"{ALL}('path.line, path.series, svg path, canvas').length > 4")
    shown = browser.text()
    assert "No data" not in shown.split("2. Is it safe?")[0]


def test_the_table_of_samples_is_a_table_and_its_texts_are_texts(page, browser):
    page("text", "best response")
    browser.wait(f"{ALL}('table td').length >= 3")
    heads = browser.run(f"[...new Set({ALL}('table th').map(cell => cell.textContent.trim()))]")
    assert {"prompt", "best response", "worst response"} <= set(heads)
    rows = browser.run(
        f"{ALL}('table').filter(table => table.tHead && table.tHead.innerText.includes('best response')).flatMap(table => "
        "[...table.tBodies[0].rows].map(row => row.children.length))"
    )
    assert rows and set(rows) == {3}
    cells = browser.run(f"{ALL}('table td').map(cell => cell.innerText)")
    shown = {" ".join(cell.split()).partition(" reward ")[0] for cell in cells}
    assert {" ".join(text.split()) for text in HOSTILE} <= shown  # every character is there to be read


def test_no_markup_of_a_response_becomes_an_element(page, browser):
    page("text", "best response")
    browser.wait(f"{ALL}('table td').length >= 3")
    for selector in (
        "td script",
        "td img",
        "td svg",
        "td iframe",
        "td a",
        "td code",
        "[href^=javascript]",
        "iframe",
        "[onerror]",
    ):
        assert browser.run(f"{ALL}({json.dumps(selector)}).length") == 0, selector
    bold = browser.run(f"{ALL}('td strong').map(element => element.textContent)")
    assert bold and all(text.startswith("reward ") for text in bold)  # the table's own
    assert browser.run("performance.getEntriesByType('resource').filter(entry => entry.name.includes('picture.png')).length") == 0


def test_pictures_are_pictures(page, browser):
    page("images", "kl_reward_path", "reliability")
    browser.wait(f"{ALL}('img').filter(picture => picture.complete && picture.naturalWidth >= 400).length >= 2")


def test_runs_compare_in_the_hparams_tab(page, browser, address):
    page("hparams", "policy/version_0", "objective/scores")
    asked = {
        "startIndex": 0,
        "sliceSize": 10,
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [
            {"hparam": "model/kl_coef"},
            *({"metric": {"group": "", "tag": tag}} for tag in ("objective/scores", "objective/kl")),
        ],
    }
    post = json.dumps({"method": "POST", "body": json.dumps(asked)})
    answer = browser.run(f"fetch('{address}data/plugin/hparams/session_groups', {post}).then(answer => answer.json())")
    (group,) = [group for group in answer["sessionGroups"] if "model/kl_coef" in group["hparams"]]
    values = {item["name"]["tag"]: item["value"] for item in group["metricValues"]}
    assert group["hparams"]["model/kl_coef"] == 0.05 and set(values) >= {"objective/scores", "objective/kl", "val/kl"}


def test_the_test_would_notice(browser):
    """What the tests above look for is found where markup is not escaped."""
    for text in (HOSTILE[1], HOSTILE[2]):
        browser.open("data:text/html," + f"<div>{text}</div>".replace("#", "%23"))
        browser.wait("window.hacks.length > 0", 20)
    browser.open("data:text/html,<script>alert('seen')</script>")
    browser.wait("document.readyState === 'complete'", 20)
    browser.rest(0.3)
    assert browser.dialogs == ["seen"]
    browser.dialogs.clear()
