// The labellers' page: one task at a time. The server's HTML is sanitised; this adds no other.
const words = JSON.parse(document.body.dataset.words);
const csrf = document.querySelector("meta[name=csrf]").content;
const $ = (id) => document.getElementById(id);
const FLAGS = ["harmful", "false", "off-topic", "wrong-language", "other"];
const LOOK_AGAIN = 4000; // ms between looks for new tasks when none is left
const DRAFT_AFTER = 400; // ms without a change before a draft is saved
const IDLE = 60000; // ms without input after which the clock stands still

let task = null; // what the server told
let work = null; // {values, confidence, strength, allBad, flags, comment, seconds}
let marked = 0; // the answer that keys speak of, by the place shown
let asWritten = false; // texts are shown letter by letter
let past = []; // earlier values, for undo
let busy = false; // a submission is under way
let requestId = ""; // of the next submission: sent again, it is written once
let draftTimer = 0;
let lastInput = Date.now();

// --- talking to the server -----------------------------------------------------------------------

class Refusal extends Error {}

async function call(method, path, body) {
  const answer = await fetch(path, {
    method,
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
    body: JSON.stringify(body ?? {}),
  });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const refusal = new Refusal(told.reason ?? "busy");
    refusal.passing = [429, 500, 502, 503, 504, 507].includes(answer.status);
    throw refusal;
  }
  return told;
}

const reason = (error) => words[`reason-${error.message}`] ?? words.retrying;

// Try until the server answers: what passes by itself is tried again, with longer and longer waits.
async function insist(method, path, body) {
  for (let wait = 1000; ; wait = Math.min(2 * wait, 15000)) {
    try {
      return await call(method, path, body);
    } catch (error) {
      if (error instanceof Refusal && !error.passing) throw error;
      say(error instanceof Refusal ? reason(error) : words.retrying);
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

function say(text) {
  $("status").textContent = text;
}

// --- a task --------------------------------------------------------------------------------------

const letter = (n) => "ABCDEFGHI"[n];
const count = () => task.answers.length;
const most = () => (task.mode === "rating" ? 7 : count());
const draftKey = () => `prefloop-draft-${task.assignment}-${task.version}`;
const placed = () => work.values.every((value) => value !== null);

function fresh() {
  const values = Array(count()).fill(null);
  return { values, confidence: null, strength: null, allBad: false, flags: [], comment: "", seconds: 0 };
}

// What was said before, as the page keeps it.
function workOf(said) {
  const found = fresh();
  if (said.ratings) found.values = [...said.ratings];
  else (said.tiers ?? []).forEach((tier, place) => tier.forEach((n) => (found.values[n] = place + 1)));
  found.confidence = said.confidence;
  found.strength = said.strength;
  found.allBad = said.all_bad;
  found.flags = said.flags;
  found.comment = said.comment;
  return found;
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(draftKey()));
  } catch {
    return null;
  }
}

async function load(path = "/api/next", note = "") {
  const told = await insist("POST", path);
  const { done, open } = told.progress;
  const shownOpen = open >= 1000 ? "1000+" : open;
  $("progress").textContent = words.done.replace("{done}", done).replace("{open}", shownOpen);
  if (told.task === null) {
    if (path === "/api/undo") return say(words["nothing-to-undo"]);
    $("work").hidden = true;
    task = null;
    say(words.finished);
    setTimeout(() => task === null && start(), LOOK_AGAIN);
    return;
  }
  task = told.task;
  // The newest of: this browser's draft, the server's, what was said before.
  const local = kept();
  const drafts = [local, task.draft].filter((d) => d && d.values?.length === count());
  drafts.sort((a, b) => b.at - a.at);
  work = { ...fresh(), ...(drafts[0] ?? (task.said ? workOf(task.said) : {})) };
  past = [];
  requestId = crypto.randomUUID?.() ?? String(Math.random()).slice(2).padEnd(12, "0");
  marked = Math.max(0, work.values.indexOf(null));
  build();
  show();
  say(note);
  toTop();
}

// A task opens at its top: what was scrolled to belongs to the one before.
function toTop() {
  answerCard(marked).focus({ preventScroll: true });
  scrollTo(0, 0);
  const { bottom } = $("prompt-head").nextElementSibling.getBoundingClientRect();
  if (bottom > innerHeight) $("prompt-head").scrollIntoView();
}

const start = () => load().catch((error) => say(reason(error)));

// --- building the page ---------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// The turns of a chat: as Markdown, sanitised by the server, or letter by letter as written.
function textOf(turns) {
  return turns.flatMap(({ role, html, raw }) => {
    const made = element("div", { className: "turn", dir: "auto" });
    if (asWritten) made.append(element("pre", { textContent: raw }));
    else made.innerHTML = html;
    return [...(role && turns.length > 1 ? [element("h3", { textContent: role })] : []), made];
  });
}

function showTexts() {
  $("prompt").replaceChildren(...textOf(task.prompt));
  task.answers.forEach((turns, n) => answerCard(n).querySelector(".text").replaceChildren(...textOf(turns)));
  $("raw").setAttribute("aria-pressed", String(asWritten));
  fold(!$("work").classList.contains("unfolded"));
}

const answerCard = (n) => $("answers").children[n];

function build() {
  $("work").hidden = false;
  if ($("guidelines").hidden) $("guidelines").open = innerWidth > 640; // once: then as the labeller likes
  $("guidelines").hidden = !task.guidelines;
  $("guidelines").querySelector(".text").innerHTML = task.guidelines; // sanitised, as above
  $("answers").replaceChildren(...task.answers.map(buildAnswer));
  $("work").classList.remove("unfolded");
  showTexts();
  const pairwise = task.mode === "pairwise";
  $("order").hidden = task.mode !== "ranking";
  $("preference").hidden = $("strength").hidden = !pairwise;
  $("all-bad-label").textContent = words[pairwise ? "both-bad" : "all-bad"];
  const choices = { first: [1, 2], second: [2, 1], tie: [1, 1] };
  fill($("preference"), Object.keys(choices), "preference", (name) => setAll(choices[name]));
  fill($("strength"), ["1", "2", "3"], "strength", (n) => change(() => (work.strength = +n)));
  fill($("confidence"), ["1", "2", "3"], "confidence", (n) => change(() => (work.confidence = +n)));
  $("places").replaceChildren(
    ...(task.mode === "ranking" ? task.answers : []).map((_, n) => {
      const place = element("li", {}, element("span", { textContent: `${n + 1}.` }));
      place.dataset.place = n + 1;
      return place;
    }),
  );
  buildFlags();
}

function focusable(made, label) {
  made.tabIndex = 0; // it scrolls
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", label);
  return made;
}

function buildAnswer(_, n) {
  const name = `${words.answer} ${letter(n)}`;
  const text = focusable(element("div", { className: "text" }), name);
  const toggle = element("button", { type: "button", textContent: words.expand });
  toggle.addEventListener("click", () => fold($("work").classList.contains("unfolded"), n));
  const card = element(
    "article",
    { className: "answer", tabIndex: -1 },
    element("h3", {}, element("span", { textContent: name }), toggle),
    text,
  );
  card.setAttribute("aria-label", name);
  if (task.mode !== "pairwise") {
    const head = words[task.mode === "rating" ? "rating" : "place"];
    const group = element("fieldset", {}, element("legend", { textContent: `${head}: ${name}`, className: "unseen" }));
    for (let value = 1; value <= most(); value++) {
      const input = element("input", { type: "radio", name: `value-${n}`, value });
      input.addEventListener("change", () => set(n, value));
      group.append(element("label", { className: "choice" }, input, String(value)));
    }
    card.append(group);
  }
  card.addEventListener("focusin", () => mark(n));
  card.addEventListener("pointerdown", () => mark(n));
  return card;
}

function fill(fieldset, names, group, choose) {
  const legend = fieldset.querySelector("legend");
  const choices = names.map((name) => {
    const input = element("input", { type: "radio", name: group, value: name });
    input.addEventListener("change", () => choose(name));
    const label = words[`${group}-${name}`] ?? words[name];
    return element("label", { className: "choice" }, input, label);
  });
  fieldset.replaceChildren(legend, ...choices);
}

function buildFlags() {
  const rows = [null, ...task.answers.keys()].map((n) => {
    const head = n === null ? words.whole : `${words.answer} ${letter(n)}`;
    const boxes = FLAGS.map((flag) => {
      const input = element("input", { type: "checkbox" });
      input.checked = work.flags.some((f) => f.answer === n && f.flag === flag);
      input.addEventListener("change", () =>
        change(() => {
          work.flags = work.flags.filter((f) => f.answer !== n || f.flag !== flag);
          if (input.checked) work.flags.push({ answer: n, flag });
        }),
      );
      return element("label", {}, input, ` ${words[flag]}`);
    });
    return element("fieldset", {}, element("legend", { textContent: head }), ...boxes);
  });
  $("flag-boxes").replaceChildren(...rows);
  $("comment").value = work.comment;
}

// --- showing what is chosen ----------------------------------------------------------------------

function show() {
  work.values.forEach((value, n) => {
    const card = answerCard(n);
    card.classList.toggle("marked", n === marked && task.mode !== "pairwise");
    card.querySelectorAll("input").forEach((input) => (input.checked = Number(input.value) === value));
  });
  const pair = work.values.join();
  const preference = { "1,2": "first", "2,1": "second", "1,1": "tie" }[pair];
  document.querySelectorAll("[name=preference]").forEach((i) => (i.checked = i.value === preference));
  for (const name of ["strength", "confidence"]) {
    document.querySelectorAll(`[name=${name}]`).forEach((i) => (i.checked = +i.value === work[name]));
  }
  $("all-bad").checked = work.allBad;
  if (task.mode === "ranking") {
    document.querySelectorAll(".chip").forEach((chip) => chip.remove());
    work.values.forEach((value, n) => {
      const slot = value === null ? $("tray") : $("places").children[value - 1];
      slot.append(chip(n));
    });
  }
}

function mark(n) {
  marked = n;
  [...$("answers").children].forEach((card, m) =>
    card.classList.toggle("marked", m === n && task.mode !== "pairwise"),
  );
}

function go(step) {
  mark((marked + step + count()) % count());
  answerCard(marked).focus();
}

// Do it, remember how it was, show it, keep it.
function change(action) {
  const before = structuredClone(work);
  action();
  past.push(before);
  show();
  keep();
}

function set(n, value) {
  change(() => (work.values[n] = value));
  const text = value === null ? words["taken-back"] : words.placed;
  say(text.replace("{answer}", letter(n)).replace("{place}", value));
}

function setAll(values) {
  change(() => (work.values = [...values]));
}

function place(value) {
  if (task.mode === "pairwise") {
    const choice = [[1, 2], [2, 1], [1, 1]][value - 1];
    if (choice) setAll(choice);
    return;
  }
  if (value > most()) return;
  set(marked, value);
  const next = work.values.indexOf(null);
  if (next >= 0) {
    mark(next);
    answerCard(next).focus();
  }
}

// Arrows move the marked answer; one without a place enters from the end it is moved away from.
function move(step) {
  if (task.mode === "pairwise") return;
  const better = task.mode === "rating" ? -step : step; // up is better
  const value = work.values[marked];
  const entry = better < 0 ? most() : 1;
  const next = value === null ? entry : value + better;
  if (next >= 1 && next <= most()) set(marked, next);
}

function takeBack() {
  if (work.values[marked] === null) {
    const last = work.values.findLastIndex((value) => value !== null);
    if (last < 0) return;
    mark(last);
  }
  set(marked, null);
  answerCard(marked).focus();
}

function allBad(on) {
  change(() => {
    work.allBad = on;
    const worst = task.mode === "rating" ? 1 : Math.max(1, ...work.values.map((v) => v ?? 0));
    if (on) work.values = work.values.map((value) => value ?? worst);
  });
}

function cycle(name) {
  change(() => (work[name] = ((work[name] ?? 0) % 3) + 1));
  say(words[`${name}-${work[name]}`]);
}

function toggleRaw() {
  asWritten = !asWritten;
  showTexts();
  say(words[asWritten ? "raw-on" : "raw-off"]);
}

// All texts fold at one height and unfold together: a long answer looks no different from the rest.
function fold(folded, n = marked) {
  const before = answerCard(n).getBoundingClientRect().top;
  $("work").classList.toggle("unfolded", !folded);
  [...$("answers").children].forEach((card, m) => {
    const button = card.querySelector("h3 button");
    const text = card.querySelector(".text");
    button.textContent = words[folded ? "expand" : "collapse"];
    button.setAttribute("aria-expanded", String(!folded));
    button.setAttribute("aria-label", `${button.textContent}: ${words.answer} ${letter(m)}`);
    if (folded) button.hidden = text.scrollHeight <= text.clientHeight;
  });
  scrollBy(0, answerCard(n).getBoundingClientRect().top - before); // what was read stays there
}

// --- drag and touch ------------------------------------------------------------------------------

function chip(n) {
  const made = element("span", { className: "chip", textContent: letter(n) });
  made.setAttribute("aria-hidden", "true"); // the buttons below the answers say the same
  made.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    made.setPointerCapture(event.pointerId);
    made.classList.add("dragged");
    const slotAt = (e) => {
      const under = document.elementsFromPoint(e.clientX, e.clientY);
      return under.map((x) => x.closest("#places li, #tray")).find(Boolean);
    };
    const clear = () => document.querySelectorAll(".over").forEach((x) => x.classList.remove("over"));
    made.addEventListener("pointermove", (e) => {
      clear();
      slotAt(e)?.classList.add("over");
    });
    const drop = (e) => {
      clear();
      made.classList.remove("dragged");
      const slot = e.type === "pointerup" && slotAt(e);
      if (slot) set(n, slot.dataset.place ? Number(slot.dataset.place) : null);
    };
    made.addEventListener("pointerup", drop, { once: true });
    made.addEventListener("pointercancel", drop, { once: true });
  });
  return made;
}

// --- keeping, submitting, undoing ----------------------------------------------------------------

function keep() {
  work.at = Date.now();
  try {
    localStorage.setItem(draftKey(), JSON.stringify(work));
  } catch {
    // without local storage the server's draft must do
  }
  clearTimeout(draftTimer);
  draftTimer = setTimeout(saveDraft, DRAFT_AFTER);
}

async function saveDraft() {
  if (task === null || busy) return;
  try {
    await call("PUT", "/api/draft", { assignment: task.assignment, draft: work });
  } catch (error) {
    say(error instanceof Refusal ? reason(error) : words.retrying);
  }
}

// Equal values in one tier; the best first: the smallest place, or the highest rating.
function tiers() {
  const levels = [...new Set(work.values)].sort((a, b) => (task.mode === "rating" ? b - a : a - b));
  return levels.map((level) => [...work.values.keys()].filter((n) => work.values[n] === level));
}

async function send(skipped) {
  if (busy || task === null) return;
  if (!skipped && !placed()) return say(words["not-all"]);
  if (work.flags.some((f) => f.flag === "other") && !work.comment.trim()) return say(words["needs-comment"]);
  busy = true;
  clearTimeout(draftTimer);
  const body = {
    assignment: task.assignment,
    base_version: task.version,
    request_id: requestId,
    tiers: skipped ? null : tiers(),
    ratings: !skipped && task.mode === "rating" ? work.values : null,
    strength: skipped || task.mode !== "pairwise" ? null : work.strength,
    confidence: work.confidence,
    all_bad: !skipped && work.allBad,
    flags: work.flags,
    comment: work.comment,
    seconds: work.seconds,
  };
  try {
    await insist("POST", "/api/submit", body);
    localStorage.removeItem(draftKey());
    await load("/api/next", words[skipped ? "skipped" : "submitted"]);
  } catch (error) {
    say(reason(error));
    const next = ["stale-lease", "already-submitted", "not-yours"].includes(error.message);
    if (next) await load("/api/next", reason(error)).catch((later) => say(reason(later)));
  } finally {
    busy = false;
  }
}

function undo() {
  if (past.length) {
    work = past.pop();
    buildFlags();
    show();
    keep();
    say(words.undone);
    return;
  }
  saveDraft()
    .then(() => load("/api/undo", words.reopened))
    .catch((error) => say(reason(error)));
}

// --- keys and buttons ----------------------------------------------------------------------------

const KEYS = {
  j: () => go(1),
  k: () => go(-1),
  ArrowUp: () => move(-1),
  ArrowDown: () => move(1),
  ArrowLeft: () => move(-1),
  ArrowRight: () => move(1),
  Backspace: takeBack,
  u: undo,
  e: () => fold($("work").classList.contains("unfolded")),
  a: () => allBad(!work.allBad),
  r: toggleRaw,
  s: () => send(true),
  f: () => $("flags").showModal(),
  c: () => cycle("confidence"),
  d: () => task.mode === "pairwise" && cycle("strength"),
  "?": () => $("help").showModal(),
  Enter: () => send(false),
};

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (task === null || event.isComposing || target.matches("textarea, input[type=text]")) return;
  if (key === "Enter" && target.closest("button, a, summary")) return;
  if (key.startsWith("Arrow")) {
    // Arrows of a radio group choose in it; on long text they scroll.
    if (target.matches("input") || target.closest(".text, details")) return;
  }
  const action = /^[1-9]$/.test(key) ? () => place(Number(key)) : KEYS[key.length === 1 ? key.toLowerCase() : key];
  if (!action || (event.repeat && !key.startsWith("Arrow"))) return;
  event.preventDefault();
  action();
});

$("submit").addEventListener("click", () => send(false));
$("undo").addEventListener("click", () => task && undo());
$("skip").addEventListener("click", () => send(true));
$("flag").addEventListener("click", () => $("flags").showModal());
$("raw").addEventListener("click", toggleRaw);
$("help-button").addEventListener("click", () => $("help").showModal());
$("all-bad").addEventListener("change", (event) => allBad(event.target.checked));
$("comment").addEventListener("input", (event) => {
  work.comment = event.target.value;
  keep();
});
$("leave").addEventListener("click", async () => {
  await call("POST", "/api/leave").catch(() => null);
  location.assign("/");
});

// Seconds in view with signs of life.
for (const kind of ["pointermove", "pointerdown", "keydown", "scroll", "touchstart"]) {
  document.addEventListener(kind, () => (lastInput = Date.now()), { passive: true, capture: true });
}
setInterval(() => {
  if (work && document.visibilityState === "visible" && Date.now() - lastInput < IDLE) work.seconds += 0.5;
}, 500);

start();
