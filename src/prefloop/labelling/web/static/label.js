// The labellers' page: one task at a time. The server's HTML is sanitised; this adds no other.
const words = JSON.parse(document.body.dataset.words);
const csrf = document.querySelector("meta[name=csrf]").content;
const $ = (id) => document.getElementById(id);
const FLAGS = ["harmful", "false", "off-topic", "wrong-language", "other"];
const LOOK_AGAIN = 4000; // ms between looks for new tasks when none is left
const DRAFT_AFTER = 400; // ms without a change before a draft is saved
const MOST_COMPARED = 8000; // characters of an answer whose differences are shown
const PREFERENCES = { first: [1, 2], second: [2, 1], tie: [1, 1] };
const IDLE = 60000; // ms without input after which the clock stands still

let task = null; // what the server told
let work = null; // {values, confidence, strength, allBad, flags, comment, seconds}
let marked = 0; // the answer that keys speak of, by the place shown
let asWritten = false; // texts are shown letter by letter
let compared = null; // the answer that the others are compared with
let reviewing = false; // the task was finished before
let asked = ""; // what a second press of the same key would do: a tie
let past = []; // earlier values, for undo
let busy = false; // a submission is under way
let requestId = ""; // of the next submission: sent again, it is written once
let draftTimer = 0;
let unsaved = false; // the draft has changed since it was sent
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
  keepClear();
}

// What scrolls stops above the bar, whatever it has come to hold: known before the next scroll, not a frame later.
function keepClear() {
  document.documentElement.style.setProperty("--bar", `${$("bar").getBoundingClientRect().height}px`);
}

// --- a task --------------------------------------------------------------------------------------

const letter = (n) => "ABCDEFGHI"[n];
const count = () => task.answers.length;
const most = () => (task.mode === "rating" ? 7 : count());
const draftKey = () => `prefloop-draft-${task.assignment}-${task.version}`;
const placed = () => work.values.every((value) => value !== null);

function fresh() {
  const values = Array(count()).fill(null);
  const said = { confidence: null, strength: null, allBad: false, flags: [], comment: "", seconds: 0 };
  return { values, filled: [], ...said }; // filled: those that "all are bad" has placed
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
  if (said.all_bad && said.tiers?.length === 1) found.filled = [...found.values.keys()];
  return found;
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(draftKey()));
  } catch {
    return null;
  }
}

const chosen = () => $("project")?.value || null; // the project whose tasks are wanted; null: all

async function load(path = "/api/next", note = "", body = {}) {
  if (path === "/api/next") body = { project: chosen() };
  const told = await insist("POST", path, body);
  const { done, skipped, left } = told.progress;
  const shownLeft = left >= 1000 ? "1000+" : left;
  const progress = words.done.replace("{done}", done).replace("{skipped}", skipped);
  $("progress").textContent = progress.replace("{left}", shownLeft);
  if (told.task === null) {
    if (path === "/api/undo") return say(words["nothing-to-undo"]);
    $("work").hidden = $("controls").hidden = true;
    task = null;
    say(words.finished);
    setTimeout(() => task === null && start(), LOOK_AGAIN);
    return;
  }
  task = told.task;
  reviewing = path !== "/api/next";
  // The newest of: this browser's draft, the server's, what was said before.
  const local = kept();
  const drafts = [local, task.draft].filter((d) => d && d.values?.length === count());
  drafts.sort((a, b) => b.at - a.at);
  work = { ...fresh(), ...(drafts[0] ?? (task.said ? workOf(task.said) : {})) };
  past = [];
  unsaved = false;
  asked = "";
  compared = null;
  requestId = crypto.randomUUID?.() ?? String(Math.random()).slice(2).padEnd(12, "0");
  marked = Math.max(0, work.values.indexOf(null));
  build();
  show();
  say(`${note} ${guidelinesNote()}`.trim());
  toTop();
}

// What to say where a project's guidelines are not those of the last task of it in this browser.
function guidelinesNote() {
  const key = `prefloop-guidelines-${task.project}`;
  let before = null;
  try {
    before = localStorage.getItem(key);
    localStorage.setItem(key, task.guidelines);
  } catch {
    // without local storage nobody can tell
  }
  if (before === null || before === task.guidelines) return "";
  $("guidelines").open = true;
  return words["guidelines-changed"].replace("{version}", task.guidelines_version);
}

// A task opens at its top: what was scrolled to belongs to the one before.
function toTop() {
  answerCard(marked).focus({ preventScroll: true });
  scrollTo(0, 0);
  const { bottom } = $("prompt-head").nextElementSibling.getBoundingClientRect();
  if (bottom > innerHeight) $("prompt-head").scrollIntoView();
}

// The task of the address (a labeller's list of own work links to it), else the next one.
async function start() {
  const own = Number(new URLSearchParams(location.search).get("assignment"));
  history.replaceState(null, "", chosen() ? `/?${new URLSearchParams({ project: chosen() })}` : "/");
  try {
    if (own) await load("/api/open", words.reopened, { assignment: own });
    else await load();
  } catch (error) {
    say(reason(error));
    if (own) await load("/api/next", reason(error)).catch((later) => say(reason(later)));
  }
}

// --- building the page ---------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// The turns of a chat: as Markdown, sanitised by the server, or letter by letter as written.
function textOf(turns, other = null) {
  return turns.flatMap(({ role, html, raw }) => {
    const made = element("div", { className: "turn", dir: "auto" });
    if (other) made.append(element("pre", {}, ...differences(other, raw)));
    else if (asWritten || compared !== null) made.append(element("pre", { textContent: raw }));
    else made.innerHTML = html;
    return [...(role && turns.length > 1 ? [element("h3", { textContent: role })] : []), made];
  });
}

function showTexts() {
  $("prompt").replaceChildren(...textOf(task.prompt));
  task.answers.forEach((turns, n) => {
    const other = compared === null || n === compared ? null : task.answers[compared].at(-1).raw;
    answerCard(n).querySelector(".text").replaceChildren(...textOf(turns, other));
  });
  $("raw").setAttribute("aria-pressed", String(asWritten));
  $("differences").setAttribute("aria-pressed", String(compared !== null));
  fold(!$("work").classList.contains("unfolded"));
}

const answerCard = (n) => $("answers").children[n];

function build() {
  $("work").hidden = $("controls").hidden = false;
  document.title = $("title").textContent = words[`title-${task.mode}`];
  $("scale").textContent = words[`scale-${task.mode}`].replace("{most}", most());
  $("practice").hidden = !task.practice;
  $("reviewing").hidden = !reviewing;
  if ($("guidelines").hidden) $("guidelines").open = innerWidth > 640; // once: then as the labeller likes
  $("guidelines").hidden = !task.guidelines;
  $("guidelines-head").textContent = words["guidelines-version"].replace("{version}", task.guidelines_version);
  $("guidelines").querySelector(".text").innerHTML = task.guidelines; // sanitised, as above
  $("answers").replaceChildren(...task.answers.map(buildAnswer));
  $("answers").dataset.count = count();
  $("work").classList.remove("unfolded");
  showTexts();
  const pairwise = task.mode === "pairwise";
  $("order").hidden = task.mode !== "ranking";
  $("more").setAttribute("aria-expanded", "false");
  $("preference").hidden = $("strength").hidden = !pairwise;
  $("all-bad-label").textContent = words[pairwise ? "both-bad" : "all-bad"];
  fill($("preference"), Object.keys(PREFERENCES), "preference", prefer, ["1", "2", "3"]);
  for (const name of ["strength", "confidence"]) {
    fill($(name), ["1", "2", "3"], name, (n) => choose(name, Number(n)));
  }
  const gap = (n) => withData(element("li", { className: "gap" }), "gap", n);
  const slot = (n) => withData(element("li", {}, element("span", { textContent: `${n}` })), "place", n);
  const slots = [...Array(most()).keys()].flatMap((n) => [slot(n + 1), gap(n + 1)]);
  $("places").replaceChildren(...(task.mode === "ranking" ? [gap(0), ...slots] : []));
  buildFlags();
}

function withData(made, name, value) {
  made.dataset[name] = value;
  return made;
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
    element("h3", {}, element("span", {}, `${words.answer} `, handle(n)), toggle),
    text,
    element("p", { className: "flagged", hidden: true }),
  );
  card.setAttribute("aria-label", name);
  if (task.mode !== "pairwise") {
    const head = words[task.mode === "rating" ? "rating" : "place"];
    const group = element("fieldset", {}, element("legend", { textContent: `${head}: ${name}`, className: "unseen" }));
    for (let value = 1; value <= most(); value++) {
      const input = element("input", { type: "radio", name: `value-${n}`, value });
      input.addEventListener("change", () => set(n, value) || show());
      group.append(element("label", { className: "choice" }, input, String(value)));
    }
    card.append(group);
  }
  card.addEventListener("focusin", () => mark(n));
  card.addEventListener("pointerdown", () => mark(n));
  return card;
}

function fill(fieldset, names, group, chosen, keys = []) {
  const legend = fieldset.querySelector("legend");
  const choices = names.map((name, n) => {
    const input = element("input", { type: "radio", name: group, value: name });
    input.addEventListener("change", () => chosen(name));
    const label = element("label", { className: "choice" }, input, words[`${group}-${name}`] ?? words[name]);
    if (keys[n]) {
      label.append(" ", element("kbd", { textContent: keys[n], ariaHidden: "true" }));
    }
    return label;
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
    showFlags(card.querySelector(".flagged"), n);
  });
  showFlags($("flagged"), null);
  $("submit").disabled = !placed();
  const pair = work.values.join();
  const preference = { "1,2": "first", "2,1": "second", "1,1": "tie" }[pair];
  document.querySelectorAll("[name=preference]").forEach((i) => (i.checked = i.value === preference));
  for (const name of ["strength", "confidence"]) {
    document.querySelectorAll(`[name=${name}]`).forEach((i) => (i.checked = +i.value === work[name]));
  }
  $("all-bad").checked = work.allBad;
  if (task.mode === "ranking") {
    document.querySelectorAll("#bar .chip").forEach((chip) => chip.remove());
    work.values.forEach((value, n) => {
      const slot = value === null ? $("tray") : $("places").querySelector(`[data-place="${value}"]`);
      slot.append(chip(n));
    });
    $("tray").hidden = placed();
  }
  keepClear();
}

// The flags of an answer, or of the whole task, where they speak of it.
function showFlags(line, n) {
  const found = work.flags.filter((flag) => flag.answer === n).map(({ flag }) => words[flag]);
  if (n === null && work.comment.trim()) found.push(work.comment.trim());
  line.hidden = !found.length;
  line.textContent = `⚑ ${found.join(", ")}`;
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

// The places that others than an answer have, best first.
const othersLevels = (n) => {
  const others = work.values.filter((value, m) => m !== n && value !== null);
  return [...new Set(others)].sort((a, b) => a - b);
};

// Put an answer between others, after `at` of their levels: those behind it move along.
function insert(n, at) {
  const levels = othersLevels(n);
  change(() => {
    work.filled = work.filled.filter((m) => m !== n);
    work.values = work.values.map((value, m) => {
      if (m === n) return at + 1;
      if (value === null) return null;
      const level = levels.indexOf(value);
      return level + (level < at ? 1 : 2);
    });
  });
  tellPlace(n);
}

function tellPlace(n) {
  const value = work.values[n];
  const text = value === null ? words["taken-back"] : words[`placed-${task.mode}`];
  say(text.replace("{answer}", letter(n)).replace("{place}", value));
}

// Do it, remember how it was, show it, keep it.
function change(action) {
  const before = structuredClone(work);
  action();
  past.push(before);
  asked = "";
  show();
  keep();
}

// Place an answer; a place that another one has asks first. Whether it was done.
function set(n, value, tie = false) {
  const others = work.values.some((other, m) => m !== n && other === value && value !== null);
  const question = `${n}=${value}`;
  if (others && task.mode === "ranking" && !tie && asked !== question) {
    asked = question;
    const holders = [...work.values.keys()].filter((m) => m !== n && work.values[m] === value);
    const text = words["tie-ask"].replaceAll("{place}", value).replace("{answer}", letter(n));
    say(text.replace("{others}", holders.map(letter).join(", ")));
    return false;
  }
  change(() => {
    work.values[n] = value;
    work.filled = work.filled.filter((m) => m !== n);
  });
  tellPlace(n);
  return true;
}

function prefer(name) {
  change(() => {
    work.values = [...PREFERENCES[name]];
    work.filled = [];
  });
  say(words[name]);
}

function place(value) {
  if (task.mode === "pairwise") {
    const name = Object.keys(PREFERENCES)[value - 1];
    if (name) prefer(name);
    return;
  }
  if (value > most() || !set(marked, value)) return;
  const next = work.values.indexOf(null);
  if (next >= 0) {
    mark(next);
    answerCard(next).focus();
  }
}

// Arrows move the marked answer past others, never onto them; one without a place enters from the
// end it is moved away from.
function move(step) {
  const value = work.values[marked];
  if (task.mode === "rating") {
    const next = value === null ? (step < 0 ? 1 : most()) : value - step; // up is better
    if (next >= 1 && next <= most()) set(marked, next);
  } else if (task.mode === "ranking") {
    const levels = othersLevels(marked);
    const before = levels.filter((other) => other < value).length;
    const up = before - (levels.includes(value) ? 0 : 1); // out of a tie, or past the next one
    const at = value === null ? (step < 0 ? levels.length : 0) : step < 0 ? up : before + 1;
    if (at >= 0 && at <= levels.length) insert(marked, at);
  }
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
    if (on) {
      const levels = othersLevels(-1);
      const own = (value) => (task.mode === "rating" ? value : levels.indexOf(value) + 1);
      const worst = task.mode === "rating" ? 1 : levels.length + 1; // below what has a place
      work.filled = [...work.values.keys()].filter((n) => work.values[n] === null);
      work.values = work.values.map((value) => (value === null ? worst : own(value)));
    } else {
      work.filled.forEach((n) => (work.values[n] = null));
      work.filled = [];
    }
  });
  say(words[on ? (task.mode === "pairwise" ? "both-bad" : "all-bad") : "not-bad"]);
}

function choose(name, value) {
  change(() => (work[name] = value));
  say(words[`${name}-${value}`]);
}

const cycle = (name) => choose(name, ((work[name] ?? 0) % 3) + 1);

function toggleDifferences() {
  const far = task.answers.some((turns) => turns.at(-1).raw.length > MOST_COMPARED);
  if (compared === null && far) return say(words["differences-long"]);
  compared = compared === null ? marked : null;
  showTexts();
  if (compared !== null) fold(false); // a difference below the fold would not be seen
  say(compared === null ? words["raw-off"] : words["differences-on"].replace("{answer}", letter(compared)));
}

// Words of one text that the other lacks (del) and the reverse (ins), by a longest common sequence.
function differences(from, to) {
  const [a, b] = [from, to].map((text) => text.match(/\s+|[^\s]+/g) ?? []);
  const width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const [down, right] = [common[(i + 1) * width + j], common[i * width + j + 1]];
      common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1 : Math.max(down, right);
    }
  }
  const parts = [];
  const add = (tag, word) => {
    const last = parts.at(-1);
    if (last?.tag === tag) last.words += word;
    else parts.push({ tag, words: word });
  };
  for (let [i, j] = [0, 0]; i < a.length || j < b.length; ) {
    if (i < a.length && j < b.length && a[i] === b[j]) add("span", (i++, b[j++]));
    else if (j === b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) add("del", a[i++]);
    else add("ins", b[j++]);
  }
  return parts.map(({ tag, words: textContent }) => element(tag, { textContent }));
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

// The letter in an answer's head: in rankings it can be dragged, too.
function handle(n) {
  if (task.mode !== "ranking") return letter(n);
  const made = chip(n);
  made.removeAttribute("aria-hidden");
  return made;
}

function chip(n) {
  const made = element("span", { className: "chip", textContent: letter(n) });
  made.setAttribute("aria-hidden", "true"); // the buttons below the answers say the same
  made.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    made.setPointerCapture(event.pointerId);
    made.classList.add("dragged");
    const slotAt = (e) => {
      const under = document.elementsFromPoint(e.clientX, e.clientY);
      return under.map((x) => x.closest("#places li, #order")).find(Boolean);
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
      if (!slot || task.mode !== "ranking") return;
      const { place, gap } = slot.dataset;
      if (gap) insert(n, othersLevels(n).filter((level) => level <= Number(gap)).length);
      else set(n, place ? Number(place) : null, true);
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
  unsaved = true;
  clearTimeout(draftTimer);
  draftTimer = setTimeout(saveDraft, DRAFT_AFTER);
}

async function saveDraft() {
  if (task === null || busy || !unsaved) return; // a draft takes a skipped task up again
  unsaved = false;
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
  if (!skipped && !placed()) return say(words[`not-all-${task.mode}`]);
  if (work.flags.some((f) => f.flag === "other") && !work.comment.trim()) return say(words["needs-comment"]);
  if (!skipped && tiers().length === 1 && !work.allBad && asked !== "all") {
    asked = "all";
    return say(words["all-tie"]);
  }
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
    guidelines_version: task.guidelines_version,
  };
  try {
    const { lesson } = await insist("POST", "/api/submit", body);
    localStorage.removeItem(draftKey());
    if (lesson) await teach(lesson, body.tiers);
    await load("/api/next", words[skipped ? "skipped" : "submitted"]);
  } catch (error) {
    say(reason(error));
    const next = ["stale-lease", "already-submitted", "not-yours", "no-project"].includes(error.message);
    if (next) await load("/api/next", reason(error)).catch((later) => say(reason(later)));
  } finally {
    busy = false;
  }
}

// After a practice task: the project's own order beside the labeller's, and why.
async function teach(lesson, own) {
  const order = (said) => said?.map((tier) => tier.map(letter).join(" = ")).join(" > ") ?? words.skipped;
  $("lesson-theirs").textContent = order(lesson.tiers);
  $("lesson-yours").textContent = order(own);
  $("lesson-reason").innerHTML = lesson.reason; // sanitised
  $("lesson").showModal();
  await new Promise((done) => $("lesson").addEventListener("close", done, { once: true }));
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
    .then(() => load("/api/undo", words.reopened, reviewing ? { before: task.assignment } : {}))
    .catch((error) => say(reason(error)));
}

// From its top, though its one button, which has the focus, is at its end.
function help() {
  $("help").showModal();
  $("help").scrollTop = 0;
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
  v: toggleDifferences,
  s: () => send(true),
  f: () => $("flags").showModal(),
  c: () => cycle("confidence"),
  d: () => task.mode === "pairwise" && cycle("strength"),
  "?": help,
  Enter: () => send(false),
};

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (task === null || event.isComposing || target.matches("textarea, select, input[type=text]")) return;
  if (key === "Enter" && target.closest("button, a, summary")) return;
  if (key.startsWith("Arrow")) {
    // Arrows of a radio group choose in it; on long text they scroll.
    if (target.matches("input") || target.closest(".text, details")) return;
  }
  const shifted = event.shiftKey && /^Digit[1-9]$/.test(event.code) && Number(event.code.slice(5));
  if (shifted && task.mode === "ranking") {
    event.preventDefault();
    return insert(marked, othersLevels(marked).filter((level) => level < shifted).length);
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
$("flags").addEventListener("close", () => answerCard(marked).scrollIntoView({ block: "nearest" })); // flags moved it
$("raw").addEventListener("click", toggleRaw);
$("help-button").addEventListener("click", help);
$("all-bad").addEventListener("change", (event) => allBad(event.target.checked));
$("differences").addEventListener("click", toggleDifferences);
$("back").addEventListener("click", () => load().catch((error) => say(reason(error))));
$("project")?.addEventListener("change", async () => {
  if (unsaved) await saveDraft();
  await start();
});
$("more").addEventListener("click", () => {
  const open = $("more").getAttribute("aria-expanded") !== "true";
  $("more").setAttribute("aria-expanded", String(open));
});
new ResizeObserver(keepClear).observe($("bar"));
$("comment").addEventListener("input", (event) => {
  work.comment = event.target.value;
  showFlags($("flagged"), null);
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
