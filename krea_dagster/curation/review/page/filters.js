// The filter: verdicts, words of the prompt, conditions on any column, and the order.

import { ask } from "./api.js";
import { open, titled } from "./dialogs.js";
import { count, el } from "./dom.js";

export const DEFAULT = {
  verdicts: [],
  search: "",
  where: [
    ["status", "is", "stored"],
    ["earlier", "is", "false"],
  ],
};
const NAMES = { none: "No verdict", keep: "Kept", reject: "Rejected", flag: "Flagged" };
/** What a column's name does not say. */
const COLUMN_NAMES = { earlier: "earlier (replaced, or its row is gone)", attempt: "attempt (from 0)" };
const WITHOUT_VALUE = new Set(["is empty", "is not empty"]);

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const isDefault = (condition) => DEFAULT.where.some((one) => same(one, condition));

/** Describes a filter briefly, for its button. */
export function inWords(selection) {
  const parts = (selection.verdicts ?? []).map((one) => NAMES[one].toLowerCase());
  const words = parts.length ? [parts.join(" or ")] : [];
  if (selection.search) words.push(`“${selection.search}”`);
  for (const condition of selection.where ?? []) {
    if (!isDefault(condition)) words.push(condition.join(" "));
  }
  if (selection.sort) words.push(`by ${selection.sort}${selection.down ? " ↓" : " ↑"}`);
  return words.join(" · ") || "All images";
}

/** The filter in the page's address, so that it survives a reload. */
export function fromAddress() {
  try {
    const found = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    return typeof found === "object" && found !== null ? found : DEFAULT;
  } catch {
    return DEFAULT;
  }
}

export function toAddress(selection) {
  const text = same(selection, DEFAULT) ? "" : `#${encodeURIComponent(JSON.stringify(selection))}`;
  history.replaceState(null, "", location.pathname + location.search + text);
}

/** Opens the dialog. `apply` is called with the new filter and throws where it is invalid. */
export async function askFilter(selection, apply) {
  const { columns } = await ask("columns");
  const byName = new Map(columns.map((one) => [one.name, one]));
  const search = el("input", { type: "search", id: "search", value: selection.search ?? "", autocomplete: "off" });
  const boxes = Object.entries(NAMES).map(([verdict, words]) => {
    const box = el("input", { type: "checkbox", value: verdict });
    box.checked = (selection.verdicts ?? []).includes(verdict);
    return [box, el("label", { class: "choice", "data-verdict": verdict }, box, el("span", {}, words))];
  });
  const list = el("div", { class: "conditions" });
  const lines = [];

  const addLine = ([column, operator, ...values]) => {
    const line = condition(columns, byName, column, operator, values, () => {
      lines.splice(lines.indexOf(line), 1);
      line.root.remove();
      add.focus();
    });
    lines.push(line);
    list.append(line.root);
    return line;
  };
  for (const one of selection.where ?? []) if (byName.has(one[0])) addLine(one);

  const add = el("button", { type: "button" }, "Add a condition");
  add.addEventListener("click", () => {
    const first = ["sharpness", "partition_key"].find((name) => byName.has(name)) ?? columns[0].name;
    addLine([first, byName.get(first).operators[0]]).root.querySelector("select").focus();
  });
  const sort = select("sort", ["", ...columns.map((one) => one.name)], selection.sort ?? "", { "": "as in the manifest", ...COLUMN_NAMES });
  const down = el("input", { type: "checkbox", id: "down" });
  down.checked = Boolean(selection.down);
  const wrong = el("p", { class: "wrong", role: "alert" });
  const reset = el("button", { type: "button" }, "Show all");
  const form = el(
    "form",
    {},
    el("label", { for: "search" }, "Words of the prompt"),
    search,
    el("fieldset", {}, el("legend", {}, "Verdict"), el("div", { class: "boxes" }, ...boxes.map(([, label]) => label))),
    el("fieldset", {}, el("legend", {}, "Columns"), list, add),
    el(
      "div",
      { class: "order" },
      el("label", { for: "sort" }, "Order"),
      sort,
      el("label", { class: "choice" }, down, el("span", {}, "Largest first")),
    ),
    byName.has("sharpness")
      ? null
      : el("p", { class: "faint" }, "There are no measures yet, such as sharpness: krea-dagster curate makes them."),
    wrong,
    el("footer", {}, reset, el("button", { type: "submit", class: "main" }, "Show")),
  );
  const dialog = titled("filter", "Filter", form);
  dialog.addEventListener("keydown", (event) => event.stopPropagation());

  const use = async (wanted) => {
    try {
      await apply(wanted);
      dialog.close();
    } catch (error) {
      wrong.textContent = error.message;
    }
  };
  reset.addEventListener("click", () => use(DEFAULT));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = {
      verdicts: boxes.filter(([box]) => box.checked).map(([box]) => box.value),
      search: search.value.trim(),
      where: lines.map((line) => line.value()),
    };
    if (sort.value) Object.assign(wanted, { sort: sort.value, down: down.checked });
    use(wanted);
  });
  open(dialog);
  search.focus();
}

let numbers = 0;

function condition(columns, byName, column, operator, values, remove) {
  const id = `condition-${++numbers}`;
  const which = select(`${id}-column`, columns.map((one) => one.name), column, COLUMN_NAMES);
  const slot = el("span", { class: "slot" });
  const away = el("button", { type: "button", class: "close", "aria-label": "Remove this condition" }, "✕");
  const root = el(
    "div",
    { class: "condition", role: "group", "aria-label": "Condition" },
    el("label", { for: which.id, class: "hidden" }, "Column"),
    which,
    slot,
    away,
  );
  let how;
  let what;
  const value = () => {
    const given = what && !what.hidden ? [what.value] : [];
    return [which.value, how.value, ...given];
  };
  const fill = (wanted, given) => {
    const one = byName.get(which.value);
    how = select(`${id}-how`, one.operators, one.operators.includes(wanted) ? wanted : one.operators[0]);
    what = field(`${id}-what`, one, given);
    const blank = () => (what.hidden = WITHOUT_VALUE.has(how.value));
    how.addEventListener("change", blank);
    blank();
    slot.replaceChildren(
      el("label", { for: how.id, class: "hidden" }, "Condition"),
      how,
      el("label", { for: what.id, class: "hidden" }, "Value"),
      what,
    );
  };
  which.addEventListener("change", () => fill("", ""));
  away.addEventListener("click", remove);
  fill(operator, values[0] ?? "");
  return { root, value };
}

/** Creates a field for a column's value: a list where it has few values. */
function field(id, column, given) {
  if (column.kind === "truth") return select(id, ["true", "false"], given || "true", { true: "yes", false: "no" });
  if (column.values) {
    const words = Object.fromEntries(column.values.map(([value, many]) => [value, `${value} (${count(many)})`]));
    const options = column.values.map(([value]) => value);
    if (!given || options.includes(given)) return select(id, options, given, words);
  }
  const kind = column.kind === "time" ? "datetime-local" : "text";
  // A range without bounds is not shown.
  const range = column.range?.every((end) => end !== null) ? column.range.map(short).join(" to ") : "";
  return el("input", { type: kind, id, value: given, placeholder: range, autocomplete: "off" });
}

const short = (number) => String(Number(number.toPrecision(4)));

function select(id, values, chosen, words = {}) {
  const options = values.map((value) => {
    const option = el("option", { value }, words[value] ?? value);
    option.selected = value === chosen;
    return option;
  });
  return el("select", { id }, ...options);
}
