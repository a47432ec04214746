// The review page: connects its parts, and defines the keys.

import { Away, Refused, ask } from "./api.js";
import { Compare } from "./compare.js";
import { askName, askNote, askTags, askWhy, meter, showHelp, showProgress } from "./dialogs.js";
import { WORDS, byId, count, el, many, named, notice, quiet, say } from "./dom.js";
import { DEFAULT, askFilter, fromAddress, inWords, toAddress } from "./filters.js";
import { Grid } from "./grid.js";
import { Inspector } from "./inspector.js";
import { List } from "./list.js";
import { Picked } from "./picked.js";
import { Verdicts } from "./verdicts.js";

const NAME_KEY = "krea-review:name";

const list = new List();
const verdicts = new Verdicts();
const picked = new Picked();
const grid = new Grid(byId("grid"), list, verdicts, picked);
const inspector = new Inspector(byId("inspector"), list, verdicts, (row, tag) => verdicts.annotate(row, { untag: [tag] }));
const compare = new Compare(verdicts, act);
let start = { reasons: [] };
let partitions = [];

const chosen = () => (compare.isOpen ? compare.row : list.row(grid.place));
/** Whether an action is for the selected images, instead of for the current one. */
const forPicked = () => picked.size > 0 && !compare.isOpen;

// -- errors and saving ------------------------------------------------------------------------

let away = false;

function troubled(error) {
  const bar = byId("trouble");
  const waiting = verdicts.waiting;
  const kept = waiting ? ` ${count(waiting)} of your verdicts wait in this browser and will be sent when it is back.` : "";
  let words = error.message;
  if (error instanceof Away) words += `${kept} Start it again on port ${location.port}.`;
  else if (error instanceof Refused && error.status === 404) {
    words = `This page's address is no longer valid: open the one that was printed last.${kept}`;
  }
  away = true;
  if (bar.textContent !== words) bar.textContent = words;
  bar.hidden = false;
  showSaved();
}

function back() {
  if (!away) return;
  away = false;
  byId("trouble").hidden = true;
  grid.draw();
  refreshProgress();
}

function showSaved() {
  const saved = byId("saved");
  const { waiting } = verdicts;
  saved.classList.toggle("waiting", waiting > 0);
  const words = waiting ? `${count(waiting)} not saved` : "All saved";
  if (saved.textContent !== words) saved.textContent = words;
}
// A verdict is usually saved within milliseconds; only longer delays are shown.
let savedTimer = 0;
function showSavedSoon() {
  savedTimer ||= setTimeout(() => {
    savedTimer = 0;
    showSaved();
  }, 200);
}

/** Runs a request and shows its error. */
async function asking(work) {
  try {
    return await work();
  } catch (error) {
    if (error instanceof Refused && error.status === 409) {
      list.dispatchEvent(new Event("changed"));
    } else if (error instanceof Away || error instanceof Refused) troubled(error);
    else throw error;
  }
  return undefined;
}

// -- the list --------------------------------------------------------------------------------

async function show(selection, place = 0) {
  if (!(await list.open(selection))) return;
  picked.clear();
  picked.anchor = place;
  toAddress(selection);
  byId("filter-text").textContent = inWords(selection);
  byId("nothing").hidden = list.count > 0;
  byId("fresh").hidden = true;
  grid.opened(place);
  showChosen();
  say(`${count(list.count)} images`);
}

function showChosen() {
  const row = list.row(grid.place);
  inspector.show(row);
  const judged = Boolean(chosen()?.image_sha256);
  for (const button of document.querySelectorAll("[data-needs-image]")) button.disabled = !judged && !forPicked();
  for (const button of document.querySelectorAll("[data-key=u]")) button.disabled = !verdicts.canUndo;
}

function showProgressBar() {
  const sum = { images: 0, keep: 0, reject: 0, flag: 0 };
  for (const one of partitions) for (const name of Object.keys(sum)) sum[name] += one[name];
  meter(sum, byId("progress-button").querySelector(".meter"));
  const judged = sum.keep + sum.reject + sum.flag;
  byId("progress-text").textContent = `${count(judged)} of ${count(sum.images)} reviewed`;
}

/** Counts a verdict at once; the server's numbers follow when it is saved. */
function countVerdict({ row, before, after }) {
  const partition = partitions.find((one) => one.partition_key === row.partition_key);
  if (!partition || row.earlier) return;
  if (before) partition[before.verdict] -= 1;
  if (after) partition[after.verdict] += 1;
  showProgressBar();
}

async function refreshProgress() {
  const found = await asking(() => ask("progress"));
  if (!found || verdicts.waiting) return;
  ({ partitions } = found);
  showProgressBar();
}
const refreshProgressSoon = quiet(700, refreshProgress);

// -- actions ---------------------------------------------------------------------------------

function move(step) {
  grid.choose(grid.place + step);
}

function onward() {
  if (compare.isOpen) compare.next();
  else move(1);
}

function give(row, verdict, reason = null) {
  verdicts.give(row, verdict, reason);
  say(`${WORDS[verdict]}${reason ? `, ${reason}` : ""}. ${named(row)}`);
  onward();
}

/** Says the same of all selected images, in one commit. A verdict ends the selection. */
async function giveAll(said, words) {
  notice(`Saving ${many(picked.size, "image")} …`);
  await verdicts.settled();
  const images = await asking(() => verdicts.batch(list.name, picked.ranges(), said));
  if (images === undefined) return;
  notice(`${words}: ${many(images, "image")}. U undoes it.`);
  if (said.verdict) picked.clear();
  readAgain();
}

/** Reads the rows again whose verdicts were not told one by one. */
function readAgain() {
  list.reload();
  grid.draw();
  refreshProgress();
}

function judge(verdict, reason = null) {
  if (forPicked()) giveAll({ verdict, reason }, WORDS[verdict]);
  else give(chosen(), verdict, reason);
}

function reject() {
  const title = forPicked() ? `Why reject ${many(picked.size, "image")}?` : "Why reject it?";
  askWhy(title, start.reasons, (reason) => judge("reject", reason));
}

/** The rows that an action is for, as far as they are loaded. */
function targets() {
  return forPicked() ? picked.places().map((place) => list.row(place)).filter(Boolean) : [chosen()];
}

let knownTags = [];
/** The tags in use are read beforehand: the dialog opens at once, so that no letter is lost. */
async function learnTags() {
  knownTags = (await asking(() => ask("tags")))?.tags ?? knownTags;
}

function tag() {
  const title = forPicked() ? `Tags of ${many(picked.size, "image")}` : "Tags";
  const tags = targets().map((row) => verdicts.about(row)?.tags ?? []);
  askTags(title, tags, knownTags, (change) => {
    for (const one of change.tag) if (!knownTags.some(([tag_]) => tag_ === one)) knownTags.push([one, 1]);
    const words = [...change.tag, ...change.untag.map((one) => `without ${one}`)].join(", ");
    if (forPicked()) giveAll({ verdict: null, ...change }, `Tagged ${words}`);
    else {
      verdicts.annotate(chosen(), change);
      say(`Tagged ${words}. ${named(chosen())}`);
    }
  });
  learnTagsSoon(); // those of others, for the next time
}
const learnTagsSoon = quiet(2000, learnTags);

function note() {
  const title = forPicked() ? `Note on ${many(picked.size, "image")}` : "Note";
  askNote(title, forPicked() ? "" : (verdicts.about(chosen())?.note ?? ""), (text) => {
    if (forPicked()) giveAll({ verdict: null, note: text }, "Noted");
    else verdicts.annotate(chosen(), { note: text });
  });
}

async function undo() {
  const done = await asking(() => verdicts.undo());
  if (done === undefined) return;
  if (done === null) say("There is nothing to undo");
  else if (done.images !== undefined) {
    const since = done.since ? ` ${many(done.since, "image")} have a later verdict, which stays.` : "";
    notice(`Undone: ${many(done.images, "image")}.${since}`);
    readAgain();
  } else if (done.since) say(`Not undone: ${done.since} has given a later verdict. ${named(done)}`);
  else {
    say(`Undone. ${named(done)}`);
    if (compare.isOpen) compare.choose(done);
    else if (list.row(done.place)?.row === done.row) grid.choose(done.place);
  }
  showChosen();
}

function pick() {
  picked.toggle(grid.place);
}

function showPicked() {
  const { size } = picked;
  byId("picked").hidden = !size;
  if (size) {
    byId("picked-text").textContent = `${count(size)} selected`;
    byId("picked-all").textContent = `Select all ${count(list.count)}`;
    byId("picked-all").hidden = size === list.count;
  }
  byId("actions").setAttribute("aria-label", size ? `Verdict on ${many(size, "selected image")}` : "Verdict on the selected image");
  if (size || !byId("picked").hidden) say(`${count(size)} selected`);
  showChosen();
}

async function next() {
  if (compare.isOpen) {
    compare.next();
    return;
  }
  // Loaded rows are searched here, the rest by the server once it has all verdicts.
  let place = grid.place + 1;
  const judged = (row) => !row.image_sha256 || verdicts.of(row);
  while (list.row(place) && judged(list.row(place))) place += 1;
  if (!list.row(place)) {
    await verdicts.settled();
    const found = await asking(() => list.next(place - 1));
    if (found === undefined) return;
    if (found === null) {
      say("Every image of this filter has a verdict");
      return;
    }
    place = found;
  }
  grid.choose(place);
}

async function compareWith(by) {
  const row = list.row(grid.place);
  if (!row) return;
  let found;
  const loaded = targets();
  if (by === "prompt" && forPicked() && loaded.length > 1) found = { rows: loaded, words: "Selected images" };
  else found = await asking(() => list.siblings(row, by));
  if (!found) return;
  if (by === "cluster" && found.rows.length < 2) {
    notice(found.words);
    return;
  }
  verdicts.learnFrom(found.rows);
  const shown = found.rows.find((one) => one.row === row.row) ?? found.rows[0];
  compare.show(found.rows, shown, found.words, () => buttons(["k", "r", "f", "t", "e", "u"]));
  showChosen();
}

function openFilter() {
  return asking(() => askFilter(list.selection, (selection) => show(selection)));
}

function openProgress() {
  showProgress(partitions, (partition) =>
    asking(() =>
      show({ verdicts: ["none"], search: "", where: [...DEFAULT.where, ["partition_key", "is", partition]] }),
    ),
  );
}

function openName() {
  askName(verdicts.reviewer, (name) => {
    verdicts.reviewer = name;
    byId("reviewer").textContent = name;
    try {
      localStorage.setItem(NAME_KEY, name);
    } catch {
      // Then it is asked again next time.
    }
  });
}

const ACTIONS = {
  k: ["Keep", () => judge("keep"), true],
  r: ["Reject", reject, true],
  f: ["Flag", () => judge("flag"), true],
  t: ["Tag", tag, true],
  e: ["Note", note, true],
  x: ["Select", pick],
  u: ["Undo", undo],
  n: ["Next", next],
  Enter: ["Compare", () => compareWith("prompt")],
};

function act(key) {
  const [, run, needsImage] = ACTIONS[key];
  if (needsImage && !forPicked() && !chosen()?.image_sha256) say("There is no image to review");
  else run();
}

function buttons(keys) {
  return keys.map((key) => {
    const [words, , needsImage] = ACTIONS[key];
    const button = el("button", {
      type: "button",
      "data-key": key,
      "aria-keyshortcuts": key.toUpperCase() === key ? key : key.toUpperCase(),
      "data-needs-image": Boolean(needsImage),
    });
    button.append(el("span", {}, words), " ", el("kbd", { "aria-hidden": "true" }, key === "Enter" ? "↵" : key));
    button.addEventListener("click", () => act(key));
    return button;
  });
}

const page = () => Math.max(1, grid.lines - 1) * grid.columns;
const KEYS = {
  " ": () => act("x"),
  a: () => picked.all(list.count),
  Escape: () => picked.clear(),
  ArrowLeft: () => move(-1),
  ArrowRight: () => move(1),
  ArrowUp: () => grid.place >= grid.columns && move(-grid.columns),
  ArrowDown: () => move(grid.columns),
  PageUp: () => move(-page()),
  PageDown: () => move(page()),
  Home: () => grid.choose(0),
  End: () => grid.choose(list.count - 1),
  Enter: () => act("Enter"),
  "/": openFilter,
  "?": showHelp,
  "+": () => grid.resize(1),
  "=": () => grid.resize(1),
  "-": () => grid.resize(-1),
  d: () => compareWith("cluster"),
  p: openProgress,
  ...Object.fromEntries(["k", "r", "f", "t", "e", "x", "u", "n"].map((key) => [key, () => act(key)])),
};

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (event.altKey || document.querySelector("dialog[open]")) return;
  if (target.matches("input, textarea, select")) return;
  const letter = key.length === 1 ? key.toLowerCase() : key;
  if ((event.ctrlKey || event.metaKey) && letter !== "a") return;
  // A key that is held down would judge images that were not seen.
  if (event.repeat && "krfx ".includes(letter)) return;
  const run = KEYS[letter];
  const onControl = target.matches("button, summary, .about");
  // A control keeps the keys it needs; letters work wherever the focus is.
  if (!run || (onControl && (key.length > 1 || key === " "))) return;
  event.preventDefault();
  const before = grid.place;
  run();
  if (MOVES.has(key) && grid.place !== before) {
    if (event.shiftKey) picked.extend(grid.place);
    else picked.anchor = grid.place;
  }
});
const MOVES = new Set(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End"]);

// -- events ----------------------------------------------------------------------------------

list.addEventListener("rows", ({ detail }) => {
  verdicts.learnFrom(detail);
  grid.draw();
  showChosen();
  back();
});
list.addEventListener("away", ({ detail }) => troubled(detail));
list.addEventListener("changed", () => {
  byId("fresh").hidden = false;
});
grid.addEventListener("chosen", showChosen);
grid.addEventListener("compare", () => compareWith("prompt"));
verdicts.addEventListener("verdicts", ({ detail }) => {
  grid.refresh(detail);
  inspector.changed(detail);
  compare.refresh();
  showChosen();
  showSavedSoon();
  refreshProgressSoon();
});
verdicts.addEventListener("given", ({ detail }) => countVerdict(detail));
verdicts.addEventListener("many", readAgain);
picked.addEventListener("picked", showPicked);
verdicts.addEventListener("saved", () => {
  showSavedSoon();
  back();
});
verdicts.addEventListener("away", ({ detail }) => troubled(detail));
verdicts.addEventListener("refused", ({ detail }) => {
  troubled(new Error(`A verdict was refused: ${detail}`));
});
verdicts.addEventListener("heard", ({ detail }) => {
  back();
  if (list.name && detail !== list.name.generation) byId("fresh").hidden = false;
});

byId("fresh-button").addEventListener("click", () => asking(() => show(list.selection, grid.place)));
byId("nothing-button").addEventListener("click", () => asking(() => show(DEFAULT)));
byId("filter-button").addEventListener("click", openFilter);
byId("progress-button").addEventListener("click", openProgress);
byId("reviewer-button").addEventListener("click", openName);
byId("picked-all").addEventListener("click", () => picked.all(list.count));
byId("picked-none").addEventListener("click", () => picked.clear());
byId("help-button").addEventListener("click", showHelp);
byId("actions").append(...buttons(Object.keys(ACTIONS)));

async function begin() {
  const first = show(fromAddress()).catch((error) => {
    if (!(error instanceof Refused)) throw error;
    return show(DEFAULT); // An old filter, whose columns no longer exist.
  });
  start = await ask("start");
  byId("title").textContent = start.title.split("/").slice(-2).join("/");
  byId("title").title = start.title;
  document.title = `Review · ${start.title.split("/").pop()}`;
  let name = null;
  try {
    name = localStorage.getItem(NAME_KEY);
  } catch {
    // Then the server's name is used.
  }
  verdicts.reviewer = new URLSearchParams(location.search).get("reviewer")?.trim() || name || start.reviewer;
  byId("reviewer").textContent = verdicts.reviewer;
  verdicts.start(start.journal, start.number);
  await first;
  byId("grid").focus({ preventScroll: true });
  await Promise.all([refreshProgress(), learnTags()]);
}

asking(begin);
