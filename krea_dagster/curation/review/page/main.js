// The review page: connects its parts, and defines the keys.

import { Away, Refused, ask } from "./api.js";
import { Compare } from "./compare.js";
import { askName, askWhy, meter, showHelp, showProgress } from "./dialogs.js";
import { WORDS, byId, count, el, named, quiet, say } from "./dom.js";
import { DEFAULT, askFilter, fromAddress, inWords, toAddress } from "./filters.js";
import { Grid } from "./grid.js";
import { Inspector } from "./inspector.js";
import { List } from "./list.js";
import { Verdicts } from "./verdicts.js";

const NAME_KEY = "krea-review:name";

const list = new List();
const verdicts = new Verdicts();
const grid = new Grid(byId("grid"), list, verdicts);
const inspector = new Inspector(byId("inspector"), list, verdicts);
const compare = new Compare(verdicts, act);
let start = { reasons: [] };
let partitions = [];

const chosen = () => (compare.isOpen ? compare.row : list.row(grid.place));

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
  for (const button of document.querySelectorAll("[data-needs-image]")) button.disabled = !judged;
  for (const button of document.querySelectorAll("[data-key=u]")) button.disabled = !verdicts.canUndo;
}

function showProgressBar() {
  const sum = { images: 0, keep: 0, reject: 0, flag: 0 };
  for (const one of partitions) for (const name of Object.keys(sum)) sum[name] += one[name];
  meter(sum, byId("progress-button").querySelector(".meter"));
  const judged = sum.keep + sum.reject + sum.flag;
  byId("progress-text").textContent = `${count(judged)} of ${count(sum.images)} reviewed`;
}

async function refreshProgress() {
  const found = await asking(() => ask("progress"));
  if (!found) return;
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

function reject(row) {
  askWhy(start.reasons, (reason) => give(row, "reject", reason));
}

function undo() {
  const row = verdicts.undo();
  if (!row) {
    say("There is nothing to undo");
    return;
  }
  if (row.since) {
    say(`Not undone: ${row.since} has given a later verdict. ${named(row)}`);
    return;
  }
  say(`Undone. ${named(row)}`);
  if (compare.isOpen) compare.choose(row);
  else if (list.row(row.place)?.row === row.row) grid.choose(row.place);
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
  const rows = await asking(() => list.siblings(row, by));
  if (!rows) return;
  verdicts.learnFrom(rows);
  const words = by === "cluster" ? "Similar images" : "Samples and attempts";
  compare.show(rows, row, words, () => buttons(["k", "r", "f", "u"]));
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
  k: ["Keep", (row) => give(row, "keep"), true],
  r: ["Reject", reject, true],
  f: ["Flag", (row) => give(row, "flag"), true],
  u: ["Undo", undo],
  n: ["Next open", next],
  Enter: ["Compare", () => compareWith("prompt")],
};

function act(key) {
  const [, run, needsImage] = ACTIONS[key];
  const row = chosen();
  if (!needsImage) run();
  else if (row?.image_sha256) run(row);
  else say("There is no image to review");
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
  ...Object.fromEntries(["k", "r", "f", "u", "n"].map((key) => [key, () => act(key)])),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]")) return;
  const { target, key } = event;
  if (target.matches("input, textarea, select")) return;
  const letter = key.length === 1 ? key.toLowerCase() : key;
  // A key that is held down would judge images that were not seen.
  if (event.repeat && "krf".includes(letter)) return;
  const run = KEYS[letter];
  const onControl = target.matches("button, summary, .about");
  // A control keeps the keys it needs; letters work wherever the focus is.
  if (!run || (onControl && key.length > 1)) return;
  event.preventDefault();
  run();
});

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
byId("help-button").addEventListener("click", showHelp);
byId("actions").append(...buttons(["k", "r", "f", "u", "n", "Enter"]));

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
  await refreshProgress();
}

asking(begin);
