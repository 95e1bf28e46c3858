"""Writes docs/images: `python -m tests.browser.screenshots` (needs Chromium).

The texts are ours; the order shown is seeded, so the pictures change only with the page.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

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
        put(folder, [pair], project="pairs", mode="pairwise")
        for key in ("1", "2", "3", "3", "3", "Enter"):
            page.keyboard.press(key)
        page.locator("#preference:not([hidden])").wait_for()
        page.keyboard.press("1")
        page.keyboard.press("d")
        take(page, "labelling-pairs")
        chromium.close()
        server.stop()
        server.store.close()


if __name__ == "__main__":
    main()
