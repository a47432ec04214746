// Several images side by side, at full size: the samples and attempts of a prompt, or a cluster.
//
// They zoom and move together, so that all show the same area.

import { full } from "./api.js";
import { open, titled } from "./dialogs.js";
import { SIGNS, WORDS, el, named } from "./dom.js";

const MOST = 16;

export class Compare {
  #verdicts;
  #act;
  #panes = [];
  #at = 0;
  #zoom = 1;
  #x = 0;
  #y = 0;
  #dialog = null;

  /** `act` takes the name of a key, and does what the key does in the grid. */
  constructor(verdicts, act) {
    this.#verdicts = verdicts;
    this.#act = act;
  }

  get isOpen() {
    return this.#dialog !== null;
  }

  get row() {
    return this.#panes[this.#at]?.row;
  }

  show(rows, chosen, words, actions) {
    this.#zoom = 1;
    this.#x = this.#y = 0;
    const some = rows.slice(0, MOST);
    this.#panes = some.map((row, at) => this.#pane(row, at));
    this.#at = Math.max(0, some.findIndex((row) => row.row === chosen.row));
    const strip = el(
      "div",
      { class: "panes", role: "listbox", tabindex: "0", "aria-label": words, "aria-orientation": "horizontal" },
      ...this.#panes.map((pane) => pane.root),
    );
    strip.style.setProperty("--many", Math.min(some.length, 4));
    const left = rows.length > some.length ? ` The first ${some.length} of ${rows.length}.` : "";
    const zoom = el("button", { type: "button", onclick: () => this.#toggle() }, "Zoom ", el("kbd", { "aria-hidden": "true" }, "z"));
    const tools = el("div", { class: "actions", role: "toolbar", "aria-label": "Verdict on the selected image" }, ...actions(), zoom);
    const dialog = titled("compare", words + left, el("p", { class: "prompt" }, chosen.prompt), strip, tools);
    this.#dialog = dialog;
    this.#strip = strip;
    dialog.addEventListener("keydown", (event) => this.#key(event));
    dialog.addEventListener("close", () => {
      this.#dialog = null;
      this.#panes = [];
    });
    open(dialog);
    strip.focus();
    this.#choose(this.#at);
  }

  #strip = null;

  refresh() {
    for (const pane of this.#panes) this.#verdict(pane);
  }

  /** Selects the next image without a verdict, starting again from the first. */
  next() {
    const open_ = (pane) => pane.row.image_sha256 && !this.#verdicts.of(pane.row);
    const after = this.#panes.findIndex((pane, at) => at > this.#at && open_(pane));
    const place = after >= 0 ? after : this.#panes.findIndex(open_);
    if (place >= 0) this.#choose(place);
  }

  choose(row) {
    const at = this.#panes.findIndex((pane) => pane.row.row === row.row);
    if (at >= 0) this.#choose(at);
  }

  #pane(row, at) {
    const image = el("img", { alt: "", draggable: "false", decoding: "async" });
    if (row.image_sha256) image.src = full(row.image_sha256);
    const view = el("div", { class: "view" }, image);
    if (!row.image_sha256) view.append(el("span", { class: "words" }, row.error_code || row.status));
    const sign = el("span", { class: "sign", "aria-hidden": "true" });
    const which = [`Sample ${row.sample}`, `attempt ${row.attempt}`];
    if (row.earlier) which.push(`${row.size} ${row.quality}`, row.successor ? "replaced" : "its row is gone");
    if (row.other_colours) which.push("other colours");
    const words = el("span", { class: "which" }, which.join(" · "));
    const said = el("span", { class: "said faint" });
    const root = el("div", { class: "pane", role: "option", id: `pane-${at}` }, view, el("div", { class: "under" }, sign, words, said));
    const pane = { row, root, view, image, sign, said };
    root.addEventListener("pointerdown", () => this.#choose(at));
    view.addEventListener("dblclick", () => this.#toggle());
    view.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    view.addEventListener("pointerdown", (event) => this.#drag(event, view));
    this.#verdict(pane);
    return pane;
  }

  #verdict({ row, root, sign, said }) {
    const found = this.#verdicts.of(row);
    const verdict = found?.verdict ?? "none";
    root.dataset.verdict = verdict;
    sign.textContent = SIGNS[verdict];
    const tags = this.#verdicts.about(row)?.tags ?? [];
    const words = found ? `${WORDS[verdict]}${found.reason ? `: ${found.reason}` : ""} · ${found.reviewer}` : "No verdict";
    said.textContent = tags.length ? `${words} · # ${tags.join(", ")}` : words;
    said.title = said.textContent;
    root.setAttribute("aria-label", `${named(row)}, sample ${row.sample}. ${said.textContent}`);
  }

  #choose(at) {
    this.#at = Math.max(0, Math.min(at, this.#panes.length - 1));
    this.#panes.forEach(({ root }, number) => root.setAttribute("aria-selected", number === this.#at));
    const { root } = this.#panes[this.#at];
    this.#strip?.setAttribute("aria-activedescendant", root.id);
    if (root.isConnected) root.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { key } = event;
    if (event.target.tagName === "BUTTON" && (key === "Enter" || key === " ")) {
      event.stopPropagation();
      return;
    }
    if (key === "ArrowRight" || key === "ArrowDown") this.#choose(this.#at + 1);
    else if (key === "ArrowLeft" || key === "ArrowUp") this.#choose(this.#at - 1);
    else if (key === "Home") this.#choose(0);
    else if (key === "End") this.#choose(this.#panes.length - 1);
    else if (key === "z") this.#toggle();
    else if (key === "+" || key === "=") this.#scale(1.25);
    else if (key === "-") this.#scale(0.8);
    else if (key === "Enter") this.#dialog.close();
    // As in the grid: a key that is held down gives no verdict.
    else if (event.repeat && "krf".includes(key)) event.preventDefault();
    else if ("krfuten".includes(key) && key.length === 1) this.#act(key);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #own() {
    // The zoom at which one pixel of the image is one pixel of the screen.
    const { image } = this.#panes[this.#at];
    return image.clientWidth ? Math.max(1, image.naturalWidth / image.clientWidth / devicePixelRatio) : 2;
  }

  #toggle() {
    this.#zoom = this.#zoom > 1 ? 1 : Math.max(this.#own(), 1.5);
    this.#x = this.#y = 0;
    this.#apply();
  }

  #scale(by) {
    this.#zoom = Math.max(1, Math.min(16, this.#zoom * by));
    this.#apply();
  }

  #wheel(event) {
    event.preventDefault();
    this.#scale(Math.exp(-event.deltaY / 400));
  }

  #drag(event, view) {
    if (this.#zoom <= 1 || event.button !== 0) return;
    event.preventDefault();
    view.setPointerCapture(event.pointerId);
    const move = (moved) => {
      const box = view.getBoundingClientRect();
      this.#x += moved.movementX / box.width;
      this.#y += moved.movementY / box.height;
      this.#apply();
    };
    view.addEventListener("pointermove", move);
    view.addEventListener("lostpointercapture", () => view.removeEventListener("pointermove", move), { once: true });
  }

  #apply() {
    const most = (this.#zoom - 1) / 2;
    this.#x = Math.max(-most, Math.min(most, this.#x));
    this.#y = Math.max(-most, Math.min(most, this.#y));
    const large = this.#zoom > 1;
    for (const { image, view } of this.#panes) {
      view.classList.toggle("large", large);
      image.style.transform = large
        ? `translate(${this.#x * 100}%, ${this.#y * 100}%) scale(${this.#zoom})`
        : "";
    }
  }
}
