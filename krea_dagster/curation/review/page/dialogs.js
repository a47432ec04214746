// The small dialogs: the reason of a rejection, the reviewer's name, the progress, and the keys.

import { count, el } from "./dom.js";

/** Opens a dialog; when it closes, the focus returns to where it was. */
export function open(dialog, { gone = true } = {}) {
  const before = document.activeElement;
  document.body.append(dialog);
  dialog.addEventListener("close", () => {
    if (gone) dialog.remove();
    before?.focus({ preventScroll: true });
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // A click outside of it.
  });
  dialog.showModal();
  return dialog;
}

export function titled(name, words, ...children) {
  const id = `${name}-title`;
  const close = el("button", { class: "close", type: "button", "aria-label": "Close" }, "✕");
  const head = el("header", {}, el("h2", { id }, words), close);
  const dialog = el("dialog", { class: name, "aria-labelledby": id }, head, ...children);
  close.addEventListener("click", () => dialog.close());
  return dialog;
}

/** Asks for the reason; calls `reject` with it, or with null where none is given. */
export function askWhy(reasons, reject) {
  const input = el("input", {
    type: "text",
    id: "why",
    maxlength: "500",
    autocomplete: "off",
    placeholder: "or in your own words",
  });
  const done = (reason) => {
    dialog.close();
    reject(reason);
  };
  const list = el(
    "ol",
    { class: "choices" },
    ...reasons.map((reason, at) =>
      el(
        "li",
        {},
        el(
          "button",
          { type: "button", "aria-keyshortcuts": at + 1, onclick: () => done(reason) },
          el("kbd", { "aria-hidden": "true" }, at + 1),
          el("span", {}, reason),
        ),
      ),
    ),
  );
  const form = el(
    "form",
    { class: "own" },
    el("label", { for: "why", class: "hidden" }, "Reason in your own words"),
    input,
    el("button", { type: "submit", class: "main" }, "Reject"),
  );
  const hint = el("p", { class: "faint" }, "Press 1 to 9 to choose, Enter to reject without a reason, Escape to cancel.");
  const dialog = titled("why", "Why reject it?", list, form, hint);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    done(input.value.trim() || null);
  });
  dialog.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = "123456789".indexOf(event.key);
    if (at >= 0 && at < reasons.length && !input.value) {
      event.preventDefault();
      done(reasons[at]);
    }
  });
  open(dialog);
  input.focus();
}

export function askName(present, take) {
  const input = el("input", { type: "text", id: "who", maxlength: "100", value: present, required: true });
  const form = el(
    "form",
    { class: "own" },
    el("label", { for: "who" }, "Your name"),
    input,
    el("button", { type: "submit", class: "main" }, "Save"),
  );
  const hint = el("p", { class: "faint" }, "It is saved with each of your verdicts, and remembered in this browser.");
  const dialog = titled("who", "Who is reviewing?", form, hint);
  dialog.addEventListener("keydown", (event) => event.stopPropagation());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const name = input.value.trim();
    if (!name) return;
    dialog.close();
    take(name);
  });
  open(dialog);
  input.select();
}

/** Shows the progress by partition; a partition's button shows its images without a verdict. */
export function showProgress(partitions, choose) {
  const rows = partitions.map((one) => {
    const judged = one.keep + one.reject + one.flag;
    const button = el(
      "button",
      { type: "button", class: "link", onclick: () => (dialog.close(), choose(one.partition_key)) },
      one.partition_key,
    );
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, button),
      ...[one.images, one.keep, one.reject, one.flag, one.images - judged].map((number) =>
        el("td", {}, count(number)),
      ),
      el("td", {}, meter(one)),
    );
  });
  const names = ["Partition", "Images", "Kept", "Rejected", "Flagged", "Open", "Progress"];
  const table = el(
    "table",
    {},
    el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...rows),
  );
  const around = el("div", { class: "around", tabindex: "0", role: "region", "aria-label": "Partitions" }, table);
  const dialog = titled("partitions", "Progress", around);
  open(dialog);
}

/** Returns a share as a width; a small share stays visible. */
function share(some, all) {
  return some && all ? `max(3px, ${(100 * some) / all}%)` : "0";
}

/** Draws a bar of the kept, flagged and rejected shares. */
export function meter(one, made = null) {
  const bar =
    made ??
    el("span", { class: "meter", "aria-hidden": "true" }, ...["keep", "flag", "reject"].map((name) => el("i", { class: name })));
  for (const name of ["keep", "flag", "reject"]) {
    bar.querySelector(`.${name}`).style.width = share(one[name], one.images);
  }
  return bar;
}

const KEYS = [
  ["← ↑ → ↓", "Move; Page Up, Page Down, Home and End move further"],
  ["k", "Keep, and go to the next"],
  ["r", "Reject; then 1 to 9, or a text and Enter, or only Enter"],
  ["f", "Flag for another look, and go to the next"],
  ["u", "Undo your last verdict"],
  ["n", "Next image without a verdict"],
  ["Enter", "Compare the samples and attempts of this prompt"],
  ["d", "Compare similar images"],
  ["/", "Filter, search and sort"],
  ["+ −", "Larger or smaller images"],
  ["p", "Progress by partition"],
  ["?", "This help"],
];
const COMPARE_KEYS = [
  ["← →", "Previous and next image"],
  ["z", "Fit to the pane, or full size; the wheel, + and − zoom in between"],
  ["k r f u", "As in the grid, for the selected image"],
  ["Escape", "Back to the grid"],
];

export function showHelp() {
  const keys = (pairs) =>
    el("dl", { class: "keys" }, ...pairs.flatMap(([key, words]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, words)]));
  open(
    titled(
      "help",
      "Keys",
      keys(KEYS),
      el("h3", {}, "While comparing"),
      keys(COMPARE_KEYS),
      el(
        "p",
        { class: "faint" },
        "Verdicts are written to the journal immediately, with your name and the time. None is overwritten: the last one on an image counts.",
      ),
    ),
  );
}
