// The small dialogs: the reason of a rejection, tags, a note, the reviewer's name, the progress, and
// the keys.

import { count, el } from "./dom.js";

/** Tags that the dialog offers, and characters of a tag. */
const MOST_TAGS = 60;
const LONGEST_TAG = 64;

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
export function askWhy(title, reasons, reject) {
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
  const dialog = titled("why", title, list, form, hint);
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

/**
 * Asks for tags. `present` has the tags of each image, `known` all tags with their numbers of images.
 * Calls `take` with the tags to add and to remove.
 */
export function askTags(title, present, known, take) {
  const has = (tag) => present.length > 0 && present.every((tags) => tags.includes(tag));
  const some = (tag) => present.some((tags) => tags.includes(tag));
  const names = [...new Set([...present.flat(), ...known.map(([tag]) => tag)])].slice(0, MOST_TAGS);
  names.sort((one, other) => some(other) - some(one) || one.localeCompare(other));
  const boxes = names.map((tag, at) => {
    const box = el("input", { type: "checkbox", value: tag, "aria-keyshortcuts": at < 9 ? at + 1 : null });
    box.checked = has(tag);
    box.indeterminate = !box.checked && some(tag);
    box.addEventListener("change", () => (box.changed = true));
    const key = at < 9 ? el("kbd", { "aria-hidden": "true" }, at + 1) : null;
    return [box, el("label", { class: "choice" }, box, el("span", {}, tag), key)];
  });
  const input = el("input", { type: "text", id: "new-tags", maxlength: "500", autocomplete: "off" });
  const wrong = el("p", { class: "wrong", role: "alert" });
  const form = el(
    "form",
    { class: "own" },
    el("label", { for: "new-tags" }, "New tags, separated by commas"),
    input,
    el("button", { type: "submit", class: "main" }, "Save"),
  );
  const list = el("div", { class: "boxes", role: "group", "aria-label": "Tags" }, ...boxes.map(([, label]) => label));
  const words = names.length ? "Press 1 to 9 for a tag above, Enter to save, Escape to cancel." : "Press Enter to save, Escape to cancel.";
  const dialog = titled("tagging", title, list, form, wrong, el("p", { class: "faint" }, words));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const added = input.value.split(/[,;]/).map((one) => one.split(/\s+/).join(" ").trim()).filter(Boolean);
    const long = added.find((one) => one.length > LONGEST_TAG);
    if (long) {
      wrong.textContent = `A tag has at most ${LONGEST_TAG} characters: ${long.slice(0, 20)}…`;
      return;
    }
    const changed = boxes.filter(([box]) => box.changed).map(([box]) => box);
    const tag = [...new Set([...changed.filter((one) => one.checked).map((one) => one.value), ...added])];
    const untag = changed.filter((one) => !one.checked).map((one) => one.value).filter((one) => !tag.includes(one));
    dialog.close();
    if (tag.length || untag.length) take({ tag, untag });
  });
  dialog.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey || input.value) return;
    const box = boxes["123456789".indexOf(event.key)]?.[0];
    if (box) {
      event.preventDefault();
      box.click();
    }
  });
  open(dialog);
  input.focus();
}

export function askNote(title, present, take) {
  const input = el("input", { type: "text", id: "note", maxlength: "2000", value: present, autocomplete: "off" });
  const form = el(
    "form",
    { class: "own" },
    el("label", { for: "note" }, "A note on the image; empty removes it"),
    input,
    el("button", { type: "submit", class: "main" }, "Save"),
  );
  const dialog = titled("note", title, form, el("p", { class: "faint" }, "The verdict stays as it is."));
  dialog.addEventListener("keydown", (event) => event.stopPropagation());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
    if (input.value.trim() !== present) take(input.value.trim());
  });
  open(dialog);
  input.select();
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
  const names = ["Partition", "Images", "Kept", "Rejected", "Flagged", "No verdict", "Progress"];
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
  ["t", "Add and remove tags"],
  ["e", "Write a note"],
  ["u", "Undo what you did last, also for many images"],
  ["n", "Next image without a verdict"],
  ["Enter", "Compare the samples and attempts of this prompt, or the selected images"],
  ["d", "Compare images that are nearly the same"],
  ["/", "Filter, search and sort"],
  ["+ −", "Larger or smaller images"],
  ["p", "Progress by partition"],
  ["?", "This help"],
];
const SELECT_KEYS = [
  ["x", "Select the image, or deselect it; also the space bar, or a click with Ctrl or ⌘"],
  ["Shift", "with an arrow key or a click: select from the last one to this one"],
  ["a", "Select all images of the filter"],
  ["Escape", "End the selection"],
];
const COMPARE_KEYS = [
  ["← →", "Previous and next image"],
  ["z", "Fit to the pane, or full size; the wheel, + and − zoom in between"],
  ["k r f t e u", "As in the grid, for the current image"],
  ["Escape", "Back to the grid"],
];
const TERMS = [
  ["verdict", "Keep, reject or flag. A flag means: needs another look. A tag or a note is not a verdict."],
  ["attempt", "How often another image of a sample was bought, from 0"],
  ["earlier", "An image that another one has replaced, or whose row changed or left the table. The filter hides it unless you set “earlier” to yes; Compare shows it with its successor."],
  ["successor", "The request whose image took the place of an earlier one"],
  ["cluster", "Images that are nearly the same have the same cluster. Colour is not compared: PDQ hashes grey values."],
];

export function showHelp() {
  const keys = (pairs) =>
    el("dl", { class: "keys" }, ...pairs.flatMap(([key, words]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, words)]));
  open(
    titled(
      "help",
      "Keys",
      keys(KEYS),
      el("h3", {}, "Many at once"),
      keys(SELECT_KEYS),
      el("p", { class: "faint" }, "K, R, F, T and E are then for all selected images, and U undoes it for all."),
      el("h3", {}, "While comparing"),
      keys(COMPARE_KEYS),
      el("h3", {}, "Words"),
      el("dl", { class: "keys" }, ...TERMS.flatMap(([term, words]) => [el("dt", {}, term), el("dd", {}, words)])),
      el(
        "p",
        { class: "faint" },
        "Verdicts are written to the journal immediately, with your name and the time. None is overwritten: the last one on an image counts.",
      ),
    ),
  );
}
