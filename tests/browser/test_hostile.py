"""500 strings that hostile models might write, in a real browser: nothing runs, nothing leaves."""

import pytest

from tests.browser.test_labelling import WIDTHS, screen
from tests.labelling.small import rows
from tests.labelling.web.hostile import RUN, hostile_strings

INERT = """() => {
  const inside = [...document.querySelectorAll(".text *, .turn *")].filter(
    (e) => !e.matches(".turn"));
  const said = (e) => e.cloneNode().outerHTML.replace(/^<ol start="[0-9]+"><.ol>$/, "");
  return {
    hacked: window.hacked ?? null,
    attributes: inside.filter((e) => e.attributes.length && said(e))
      .map((e) => e.outerHTML.slice(0, 80)),
    scripts: [...document.scripts].map((s) => new URL(s.src).pathname),
    frames: window.length,
    left: document.querySelector("#submit, .main").getBoundingClientRect().width > 0,
  };
}"""


def put_strings(store, strings):
    """As answers of tasks of nine; straight into the store: no file holds half characters."""
    with store.write() as t:
        project = t.project("main")["id"]
        for number, group in enumerate(strings):
            prompt = t.put_prompt(project, f"{number}: {group[0][:5000]}", {})
            ids = [t.put_response(prompt, text) for text in group]
            t.put_task(
                project_id=project,
                prompt_id=prompt,
                key=str(number),
                kind="real",
                response_ids=ids,
                need=1,
                priority=1,
            )


def check_inert(watched, server, scripts):
    found = watched.page.evaluate(INERT)
    assert found["hacked"] is None
    assert found["attributes"] == []
    assert found["scripts"] == scripts
    assert found["frames"] == 0
    assert found["left"]
    assert [url for url in watched.asked if not url.startswith(server.url + "/")] == []


@pytest.mark.parametrize(("width", "every"), [(390, 9), (1280, 1), (1920, 9)])
def test_500_strings_are_inert(serve, enter, width, every):
    """All at one width, each ninth at the others."""
    server = serve(rows(1))
    strings = hostile_strings()[::every]
    groups = [strings[at : at + 9] for at in range(0, len(strings), 9)]
    put_strings(server.store, groups)
    watched = enter(server, "boss", **screen(width))
    page = watched.page
    seen = set()
    for _ in groups:
        page.locator("#progress", has_text=f"{len(seen)} done").wait_for()
        page.wait_for_function("() => !document.querySelector('#work').hidden")
        seen.add(page.locator("#prompt").inner_text()[:20])
        check_inert(watched, server, ["/static/label.js"])
        page.keyboard.press("e")  # the whole of the first answer
        page.keyboard.press("a")
        page.keyboard.press("Enter")
    assert len(seen) == len(groups)
    page.locator("#progress", has_text=f"{len(groups)} done").wait_for()
    for task in range(2, len(groups) + 2, 6):  # the admin sees the same
        page.goto(f"{server.url}/admin/task?project=main&id={task}")
        check_inert(watched, server, [])


@pytest.mark.parametrize("width", WIDTHS)
def test_names_comments_and_guidelines_are_inert_too(serve, enter, tmp_path, width):
    attack = f"<img src=x onerror={RUN}><script>{RUN}</script>"
    (tmp_path / "rules.md").write_text(attack)
    hostile = [row | {"prompt": attack} for row in rows(2)]
    server = serve(hostile, guidelines=tmp_path / "rules.md", project=attack)
    with server.store.write() as t:
        t.put_labeller(attack, "admin", "token-eve")
    watched = enter(server, "eve", **screen(width))
    page = watched.page
    page.locator(".answer").first.wait_for()
    check_inert(watched, server, ["/static/label.js"])
    page.keyboard.press("f")
    page.get_by_label("harmful").first.check()
    page.get_by_label("Comment").fill(attack)
    page.keyboard.press("Escape")
    for key in "123":
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    page.get_by_role("status").filter(has_text="Submitted").wait_for()
    for path in ("/admin", "/admin/quality?project=" + attack.replace("=", "%3D")):
        page.goto(server.url + path)
        assert page.evaluate("() => window.hacked ?? null") is None
        assert page.evaluate("() => document.scripts.length + document.images.length") == 0
