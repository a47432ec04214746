// The side panel: the selected image, larger, with its prompt, values and history.

import { full, small } from "./api.js";
import { SIGNS, WORDS, el, quiet } from "./dom.js";

/** The values shown first; all others are in the table below. */
const FACTS = [
  ["seed", "Seed"],
  ["quality", "Quality"],
  ["partition_key", "Partition"],
  ["status", "State"],
  ["credits_charged", "Credits"],
];
const ELSEWHERE = new Set([
  ...FACTS.map(([name]) => name),
  ...["prompt", "image_sha256", "perceptual_hash", "width", "height", "sample", "attempt", "model"],
  ...["image_path", "task_id", "run_id", "request_key", "billing_rule", "user_group", "earlier", "successor"],
]);

export function when(text) {
  if (!text) return "just now";
  return new Date(text).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
}

export function asText(value) {
  if (typeof value === "number" && !Number.isInteger(value)) return value.toPrecision(4);
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

export class Inspector {
  #root;
  #list;
  #verdicts;
  #row;
  #untag;
  #stop = new AbortController();
  #parts;
  #later = quiet(140, () => this.#fetch());

  /** `untag` is called with a row and a tag to remove. */
  constructor(root, list, verdicts, untag) {
    this.#untag = untag;
    this.#root = root;
    this.#list = list;
    this.#verdicts = verdicts;
    const image = el("img", { alt: "", decoding: "async" });
    const verdict = el("p", { class: "present" });
    const tags = el("ul", { class: "tags", "aria-label": "Tags" });
    const note = el("p", { class: "note" });
    const prompt = el("p", { class: "prompt" });
    const facts = el("dl", { class: "facts" });
    const history = el("ol", { class: "history" });
    const further = el("dl", { class: "facts" });
    const more = el("details", {}, el("summary", {}, "All columns"), further);
    const past = el("section", {}, el("h3", {}, "Verdicts"), history);
    this.#parts = { image, verdict, tags, note, prompt, facts, history, further, more, past };
    const frame = el("div", { class: "frame" }, image);
    const words = el("div", { class: "about", tabindex: "0", role: "group" }, verdict, tags, note, prompt, facts, past, more);
    words.setAttribute("aria-label", "About the image");
    root.append(el("h2", { class: "hidden" }, "The selected image"), frame, words);
    image.addEventListener("load", () => image.classList.add("there"));
  }

  show(row) {
    if (row === this.#row) return;
    this.#row = row;
    this.#stop.abort();
    const { image, prompt, facts, history, further, past } = this.#parts;
    past.hidden = true;
    this.#root.classList.toggle("blank", !row);
    for (const one of [facts, history, further]) one.replaceChildren();
    prompt.textContent = row?.prompt ?? "";
    if (row?.image_sha256) image.src = small(row.image_sha256);
    else image.removeAttribute("src");
    this.verdict();
    if (row) this.#later();
  }

  /** Updates the panel after verdicts on these images changed. */
  changed(shas) {
    this.verdict();
    if (shas.has(this.#row?.image_sha256)) this.#later();
  }

  verdict() {
    const { verdict, tags, note } = this.#parts;
    const row = this.#row;
    const found = row ? this.#verdicts.of(row) : null;
    const about = row ? this.#verdicts.about(row) : null;
    tags.hidden = !about?.tags?.length;
    tags.replaceChildren(...(about?.tags ?? []).map((tag) => this.#tag(row, tag)));
    note.hidden = !about?.note;
    note.textContent = about?.note ?? "";
    verdict.dataset.verdict = found?.verdict ?? "none";
    if (!row) verdict.textContent = "";
    else if (!found) verdict.textContent = row.image_sha256 ? "No verdict yet" : "No image";
    else {
      const why = found.reason ? `: ${found.reason}` : "";
      verdict.textContent = `${SIGNS[found.verdict]} ${WORDS[found.verdict]}${why} · ${found.reviewer}`;
    }
  }

  #tag(row, tag) {
    const remove = el("button", { type: "button", "aria-label": `Remove the tag ${tag}` }, "✕");
    remove.addEventListener("click", () => this.#untag(row, tag));
    return el("li", {}, tag, remove);
  }

  async #fetch() {
    const row = this.#row;
    if (!row || !this.#root.checkVisibility()) return;
    const stop = (this.#stop = new AbortController());
    let found;
    try {
      found = await this.#list.whole(row, stop.signal);
    } catch {
      return; // The list reports the error.
    }
    if (row !== this.#row) return;
    const { image, prompt, facts, history, further, past } = this.#parts;
    if (row.image_sha256) image.src = full(row.image_sha256);
    const all = found.row;
    prompt.textContent = all.prompt;
    const which = [`sample ${all.sample}`, all.attempt ? `attempt ${all.attempt}` : ""];
    if (all.earlier) which.push(all.successor ? "replaced by a later image" : "its row is gone");
    facts.replaceChildren(
      ...pair("Image", all.width ? `${all.width} × ${all.height} px, ${all.image_format ?? ""}` : "–"),
      ...pair("Which", which.filter(Boolean).join(", ")),
      ...FACTS.flatMap(([name, words]) => (all[name] === null ? [] : pair(words, asText(all[name])))),
    );
    further.replaceChildren(
      ...Object.entries(all)
        .filter(([name, value]) => value !== null && !ELSEWHERE.has(name))
        .flatMap(([name, value]) => pair(name, asText(value))),
    );
    past.hidden = !found.history.length;
    history.replaceChildren(...found.history.map(said));
  }
}

function pair(name, value) {
  return [el("dt", {}, name), el("dd", {}, value)];
}

function said(one) {
  let words = one.verdict === "none" ? "Taken back" : WORDS[one.verdict];
  let why = one.reason ? `: ${one.reason}` : "";
  if (one.annotates) {
    words = one.tags.length ? `Tagged ${one.tags.join(", ")}` : "Tags and note";
    why = one.note ? `. ${one.note}` : "";
  }
  return el(
    "li",
    { "data-verdict": one.annotates ? "none" : one.verdict },
    el("span", {}, `${words}${why}`),
    el("span", { class: "faint" }, `${one.reviewer}, ${when(one.at)}`),
  );
}
