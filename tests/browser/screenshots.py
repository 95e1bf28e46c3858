"""Writes docs/images: `python -m tests.browser.screenshots` (needs Chromium).

The texts are ours; the order shown is seeded, so the pictures change only with the page.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

from playwright.sync_api import sync_playwright

from prefloop.labelling.assign import Judgement, next_assignment, submit
from prefloop.labelling.store.projects import change_project, locked_project
from tests.browser.conftest import CHROMIUM, FLAGS, Server
from tests.labelling.small import put

IMAGES = Path(__file__).parents[2] / "docs" / "images"
ANSWERS = [
    "Boil the kettle, warm the pot, add **one spoon of leaves a cup**, pour, wait four minutes.",
    "Tea is a drink. People drink it in many countries, and it has a long history.",
    "1. Warm the pot.\n2. Add leaves.\n3. Pour boiling water.\n4. Wait *three to five* minutes.",
    "Put a bag into cold water and heat it in the microwave until it boils over.",
]
GUIDELINES = "Prefer answers that are **true** and that help. Equal answers get the same place."


def history(folder, server):
    """A month of three more labellers, more alike from week to week; two changes of settings."""
    draw = Random(0)
    data = [
        {"prompt": f"{topic}?", "completions": [f"{k}. {topic}" for k in range(3)]}
        for topic in (f"How do I make tea, case {n}" for n in range(300))
    ]
    clock = server.store.clock
    with server.store.write() as t:
        people = [t.put_labeller(name, "labeller", name) for name in ("dora", "emil", "fred")]
        admin = t.labeller_named("boss")["id"]
        for rules in ("Prefer answers that are **true**.", GUIDELINES + "\n\n- Short is good."):
            found = locked_project(t, "main")
            change_project(t, found, admin, rules, found["settings"] | {"gold_share": 0.1})
    put(folder, data, need=2)
    start = clock()
    for day in range(30):
        server.store.clock = lambda day=day: start - 86_400 * (29 - day)
        for who in people if day % 7 < 5 else ():
            for _ in range(draw.randint(1, 3 + day // 4)):
                task = next_assignment(server.store, who)
                if task is None:
                    continue
                order = [0, 1, 2] if draw.random() < 0.3 + day / 50 else draw.sample(range(3), 3)
                said = Judgement(
                    [[i] for i in order],
                    seconds=draw.expovariate(1 / 30),
                    request_id=f"{who}-{task.id}",
                )
                submit(server.store, who, task.id, said)
    server.store.clock = clock


# Whether two Korean letters look alike: then both are the box of a font that has neither.
BOXES = """() => {
  const [one, other] = ["한", "국"].map((letter) => {
    const canvas = document.createElement("canvas");
    canvas.getContext("2d").fillText(letter, 9, 9);
    return canvas.toDataURL();
  });
  return one === other;
}"""


def main():
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        (folder / "guidelines.md").write_text(GUIDELINES)
        asked = [{"prompt": "How do I make good black tea?", "completions": ANSWERS}]
        asked.append({"prompt": "How long does tea keep?", "completions": ANSWERS[::-1]})
        pair = {"prompt": "How do I make good black tea?", "completions": ANSWERS[::2]}
        put(folder, asked, guidelines=folder / "guidelines.md", need=2)
        server = Server(folder)
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        if chromium.new_page().evaluate(BOXES):
            raise SystemExit("no Korean font: apt-get install fonts-noto-cjk, or such a one")

        def enter(who, width, height, locale="en-GB"):
            size = {"width": width, "height": height}
            touch = {"has_touch": width < 600, "is_mobile": width < 600}
            page = chromium.new_context(viewport=size, locale=locale, **touch).new_page()
            page.goto(f"{server.url}/enter?token=token-{who}")
            page.locator("#progress", has_text="0").wait_for()
            return page

        def take(page, name):
            page.wait_for_timeout(600)  # the draft is saved, the note is read
            page.screenshot(path=IMAGES / f"{name}.png")

        IMAGES.mkdir(exist_ok=True)
        page = enter("ann", 1280, 860)
        for key in "132c":
            page.keyboard.press(key)
        take(page, "labelling-ranking")
        for key in ("4", "Enter"):
            page.keyboard.press(key)
        page.locator("#progress", has_text="1 done").wait_for()
        phone = enter("bob", 360, 740, "ko-KR")
        for key in "2111":
            phone.keyboard.press(key)
        take(phone, "labelling-phone")
        for key in ("4", "Enter"):
            phone.keyboard.press(key)
        phone.locator("#progress", has_text="1").wait_for()
        admin = enter("boss", 1280, 860)
        admin.goto(f"{server.url}/admin/quality?project=main")
        take(admin, "labelling-quality")
        history(folder, server)
        for path in (
            "tasks?state=disputed&project=main",
            "charts?project=main",
            "settings?project=main",
        ):
            admin.goto(f"{server.url}/admin/{path}")
            take(admin, f"labelling-{path.split('?')[0]}")
        put(folder, [pair], project="pairs", mode="pairwise")
        page.goto(f"{server.url}/?project=pairs")
        page.locator("#preference:not([hidden])").wait_for()
        page.keyboard.press("1")
        page.keyboard.press("d")
        take(page, "labelling-pairs")
        chromium.close()
        server.stop()
        server.store.close()


if __name__ == "__main__":
    main()
