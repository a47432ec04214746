// The grid: as many cells as fit the window, for a list of any length.
//
// Lines of cells are reused when they leave the window, with the browser's native scrolling. A list
// that is higher than browsers can scroll is scrolled in larger steps.

import { small } from "./api.js";
import { SIGNS, WORDS, count, el, named } from "./dom.js";

const GAP = 8;
const EDGE = 12;
/** Browsers lay out at most about 16 million pixels of height. */
const HIGHEST = 8_000_000;
const SIZES = [104, 148, 196, 264, 360];
/** Lines beyond the window that are kept ready. */
const BEYOND = 2;
/** Above this scrolling speed, in windows per second, no images are requested. */
const TOO_FAST = 6;

export class Grid extends EventTarget {
  #root;
  #list;
  #verdicts;
  #space;
  #lines = new Map();
  #spare = [];
  #columns = 1;
  #side = 100;
  #size = 2;
  #frame = 0;
  #settle = 0;
  #lastTop = 0;
  #lastAt = 0;
  #fast = false;

  #picked;

  constructor(root, list, verdicts, picked) {
    super();
    this.#root = root;
    this.#list = list;
    this.#verdicts = verdicts;
    this.#picked = picked;
    picked.addEventListener("picked", () => this.#later());
    this.place = 0;
    this.#space = el("div", { class: "space", role: "presentation" });
    root.append(this.#space);
    root.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    root.addEventListener("click", (event) => this.#clicked(event));
    root.addEventListener("dblclick", () => this.dispatchEvent(new Event("compare")));
    new ResizeObserver(() => this.measure()).observe(root);
  }

  get columns() {
    return this.#columns;
  }

  /** The number of lines that fit the window. */
  get lines() {
    return Math.max(1, Math.floor(this.#root.clientHeight / this.#pitch));
  }

  get #pitch() {
    return this.#side + GAP;
  }

  get #count() {
    return Math.ceil(this.#list.count / this.#columns);
  }

  /** The height of all lines, pixels. */
  get #height() {
    return this.#count * this.#pitch - GAP + 2 * EDGE;
  }

  get #offset() {
    const top = this.#root.scrollTop;
    if (this.#height <= HIGHEST) return top;
    const window_ = this.#root.clientHeight;
    return (top / (HIGHEST - window_)) * (this.#height - window_);
  }

  resize(step) {
    const size = Math.min(SIZES.length - 1, Math.max(0, this.#size + step));
    if (size === this.#size) return;
    this.#size = size;
    this.measure();
  }

  /** Lays out the lines again, with the selected cell at the same position in the window. */
  measure() {
    const width = this.#root.clientWidth - 2 * EDGE;
    if (width <= 0) return;
    const above = this.#topOf(this.place) - this.#offset;
    const wanted = Math.min(SIZES[this.#size], Math.floor((width - 2 * GAP) / (this.#size > 2 ? 2 : 3)));
    this.#columns = Math.max(1, Math.floor((width + GAP) / (wanted + GAP)));
    this.#side = Math.floor((width - GAP * (this.#columns - 1)) / this.#columns);
    this.#root.setAttribute("aria-colcount", this.#columns);
    this.#root.setAttribute("aria-rowcount", Math.max(1, this.#count));
    this.#space.style.height = `${Math.min(this.#height, HIGHEST)}px`;
    this.#space.style.setProperty("--side", `${this.#side}px`);
    for (const line of this.#lines.values()) line.remove();
    this.#lines.clear();
    this.#spare = [];
    const inside = above > -this.#side && above < this.#root.clientHeight;
    if (inside && this.place) this.#scrollTo(this.#topOf(this.place) - above);
    this.draw();
  }

  /** Shows a newly opened list. */
  opened(place = 0) {
    this.place = Math.max(0, Math.min(place, this.#list.count - 1));
    this.#root.scrollTop = 0;
    this.measure();
    this.show();
  }

  /** Goes to a place, and scrolls it into the window. */
  choose(place) {
    if (!this.#list.count) return;
    const before = this.place;
    this.place = Math.max(0, Math.min(place, this.#list.count - 1));
    this.show();
    this.#mark(before);
    this.#mark(this.place);
    this.dispatchEvent(new Event("chosen"));
  }

  show() {
    const top = this.#topOf(this.place);
    const window_ = this.#root.clientHeight;
    const offset = this.#offset;
    if (top - EDGE < offset) this.#scrollTo(top - EDGE);
    else if (top + this.#side + EDGE > offset + window_) {
      this.#scrollTo(top + this.#side + EDGE - window_);
    }
    this.draw();
  }

  #topOf(place) {
    return EDGE + Math.floor(place / this.#columns) * this.#pitch;
  }

  #scrollTo(offset) {
    const window_ = this.#root.clientHeight;
    const most = Math.max(0, this.#height - window_);
    const wanted = Math.max(0, Math.min(offset, most));
    this.#root.scrollTop =
      this.#height <= HIGHEST ? wanted : (wanted / most) * (HIGHEST - window_);
  }

  #scrolled() {
    const now = performance.now();
    const passed_s = Math.max(0.001, (now - this.#lastAt) / 1000);
    const windows = Math.abs(this.#offset - this.#lastTop) / Math.max(1, this.#root.clientHeight);
    this.#fast = passed_s < 0.5 && windows / passed_s > TOO_FAST;
    this.#lastTop = this.#offset;
    this.#lastAt = now;
    clearTimeout(this.#settle);
    this.#settle = setTimeout(() => {
      this.#fast = false;
      this.draw();
    }, 90);
    this.#later();
  }

  #later() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.draw();
    });
  }

  /** Draws the lines in the window. */
  draw() {
    const offset = this.#offset;
    const first = Math.max(0, Math.floor((offset - EDGE) / this.#pitch) - BEYOND);
    const last = Math.min(
      this.#count - 1,
      Math.floor((offset + this.#root.clientHeight - EDGE) / this.#pitch) + BEYOND,
    );
    for (const [number, line] of this.#lines) {
      if (number < first || number > last) {
        this.#lines.delete(number);
        this.#spare.push(line);
      }
    }
    const shift = this.#root.scrollTop - offset;
    for (let number = first; number <= last; number++) {
      let line = this.#lines.get(number);
      if (!line) {
        line = this.#spare.pop() ?? this.#line();
        this.#lines.set(number, line);
        line.hidden = false;
        line.setAttribute("aria-rowindex", number + 1);
        line.number = number;
      }
      const top = Math.round(EDGE + number * this.#pitch + shift);
      if (line.top !== top) {
        line.top = top;
        line.style.transform = `translateY(${top}px)`;
      }
      for (let column = 0; column < this.#columns; column++) {
        this.#fill(line.cells[column], number * this.#columns + column);
      }
    }
    for (const line of this.#spare) line.hidden = true;
    const chosen = this.#cell(this.place);
    if (chosen && this.#list.count) this.#root.setAttribute("aria-activedescendant", chosen.id);
    else this.#root.removeAttribute("aria-activedescendant");
    if (!this.#fast) this.#list.want(first * this.#columns, (last + 1) * this.#columns - 1);
  }

  /** Redraws the cells of these images after their verdicts changed. */
  refresh(shas) {
    for (const line of this.#lines.values()) {
      for (const cell of line.cells) if (shas.has(cell.sha256)) this.#verdict(cell);
    }
  }

  #cell(place) {
    return this.#lines.get(Math.floor(place / this.#columns))?.cells[place % this.#columns];
  }

  #mark(place) {
    const cell = this.#cell(place);
    if (cell) this.#choice(cell);
  }

  #line() {
    const line = el("div", { class: "line", role: "row" });
    line.cells = [];
    for (let column = 0; column < this.#columns; column++) {
      const image = el("img", { alt: "", decoding: "async", draggable: "false" });
      const sign = el("span", { class: "sign", "aria-hidden": "true" });
      const words = el("span", { class: "words" });
      const marks = el("span", { class: "marks", "aria-hidden": "true" });
      const tick = el("span", { class: "tick", "aria-hidden": "true" });
      const cell = el("div", { class: "cell", role: "gridcell", "aria-colindex": column + 1 });
      cell.append(image, words, sign, marks, tick);
      Object.assign(cell, { image, sign, words, marks, place: -1, row: undefined, sha256: undefined });
      image.addEventListener("error", () => {
        if (image.hasAttribute("src")) cell.classList.add("broken");
      });
      line.cells.push(cell);
      line.append(cell);
    }
    this.#space.append(line);
    return line;
  }

  #fill(cell, place) {
    const row = this.#list.row(place);
    const beyond = place >= this.#list.count;
    if (cell.place !== place) {
      cell.place = place;
      cell.id = `place-${place}`;
      cell.hidden = beyond;
    }
    this.#choice(cell);
    if (cell.row !== row || row === undefined) {
      cell.row = row;
      const sha256 = row?.image_sha256 ?? undefined;
      if (cell.sha256 !== sha256 || !row) {
        cell.sha256 = sha256;
        cell.image.removeAttribute("src");
        cell.classList.remove("broken");
      }
      cell.classList.toggle("blank", !row);
      cell.words.textContent = row && !sha256 ? row.error_code || row.status : "";
      this.#verdict(cell);
    }
    if (cell.sha256 && !this.#fast && !cell.image.hasAttribute("src")) {
      cell.image.src = small(cell.sha256);
    }
  }

  #choice(cell) {
    const chosen = cell.place === this.place;
    const picked = this.#picked.has(cell.place);
    const selected = this.#picked.size ? picked : chosen;
    if (cell.chosen === chosen && cell.picked === picked && cell.selected === selected) return;
    Object.assign(cell, { chosen, picked, selected });
    cell.classList.toggle("chosen", chosen);
    cell.classList.toggle("ticked", picked);
    cell.setAttribute("aria-selected", selected);
  }

  #verdict(cell) {
    const { row } = cell;
    const verdict = row ? (this.#verdicts.of(row)?.verdict ?? "none") : "none";
    if (cell.dataset.verdict !== verdict) {
      cell.dataset.verdict = verdict;
      cell.sign.textContent = SIGNS[verdict];
    }
    const about = row ? this.#verdicts.about(row) : null;
    const tags = about?.tags ?? [];
    const marks = [row?.earlier ? "earlier" : "", tags.length ? `# ${tags.length}` : "", about?.note ? "✎" : ""].filter(Boolean).join("  ");
    if (cell.marks.textContent !== marks) cell.marks.textContent = marks;
    const place = `${count(cell.place + 1)} of ${count(this.#list.count)}`;
    const said = `${row?.earlier ? "Earlier. " : ""}${WORDS[verdict]}. ${tags.length ? `Tags: ${tags.join(", ")}. ` : ""}${about?.note ? "Has a note. " : ""}`;
    const label = row ? `${named(row)}. ${said}${place}` : `Loading. ${place}`;
    cell.setAttribute("aria-label", label);
  }

  #clicked(event) {
    const cell = event.target.closest(".cell");
    if (cell && !cell.hidden) {
      const { place } = cell;
      // A finger has no Shift: once an image is selected, a tap selects or deselects.
      const taps = event.pointerType === "touch" && this.#picked.size > 0;
      if (event.shiftKey) this.#picked.extend(place);
      else if (event.ctrlKey || event.metaKey || taps) this.#picked.toggle(place);
      else {
        this.#picked.clear();
        this.#picked.anchor = place;
      }
      this.choose(place);
    }
    this.#root.focus({ preventScroll: true });
  }
}
