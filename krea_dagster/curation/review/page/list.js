// The list that is looked through: its length, and its rows, fetched in pages when they come near.
//
// A list is the rows of a filter as the verdicts stood at one number. So it does not move while a
// reviewer works through it, and another process of the server gives the same list.

import { Away, Refused, ask } from "./api.js";

const PAGE = 200;
const KEPT_PAGES = 80;
const AT_ONCE = 3;

export class List extends EventTarget {
  constructor() {
    super();
    this.count = 0;
    this.selection = {};
    this.pages = new Map();
    this.asked = new Map();
    this.opened = 0;
  }

  /** Opens the list of a filter. Raises Refused where it cannot be understood. */
  async open(selection) {
    const text = JSON.stringify(selection);
    const turn = ++this.opened;
    const found = await ask("view", { selection: text });
    if (turn !== this.opened) return false;
    for (const one of this.asked.values()) one.abort();
    this.asked.clear();
    this.pages.clear();
    this.selection = selection;
    this.name = { selection: text, number: found.number, generation: found.generation };
    this.count = found.count;
    return true;
  }

  row(place) {
    return this.pages.get(Math.floor(place / PAGE))?.[place % PAGE];
  }

  /** Sees that the rows from one place to another are fetched, and those beside them. */
  want(first, last) {
    if (!this.count) return;
    this.nearest = Math.floor((first + last) / 2 / PAGE);
    const from = Math.max(0, Math.floor(first / PAGE));
    const to = Math.min(Math.floor((this.count - 1) / PAGE), Math.floor(last / PAGE));
    const wanted = new Set();
    for (let page = from; page <= to; page++) wanted.add(page);
    if (wanted.size === 1) {
      if (to * PAGE + PAGE < this.count) wanted.add(to + 1);
      if (from > 0) wanted.add(from - 1);
    }
    for (const [page, one] of this.asked) {
      if (!wanted.has(page)) {
        one.abort();
        this.asked.delete(page);
      }
    }
    for (const page of wanted) {
      if (this.asked.size >= AT_ONCE) break;
      if (!this.pages.has(page) && !this.asked.has(page)) this.#fetch(page);
    }
  }

  async #fetch(page) {
    const stop = new AbortController();
    this.asked.set(page, stop);
    const { name } = this;
    try {
      const found = await ask("rows", { ...name, offset: page * PAGE, limit: PAGE }, stop.signal);
      if (name !== this.name) return;
      found.rows.forEach((row, at) => {
        row.place = page * PAGE + at;
      });
      this.pages.set(page, found.rows);
      this.#forget();
      this.dispatchEvent(new CustomEvent("rows", { detail: found.rows }));
    } catch (error) {
      if (stop.signal.aborted) return;
      if (error instanceof Refused && error.status === 409) {
        this.dispatchEvent(new Event("changed"));
      } else if (error instanceof Away || error instanceof Refused) {
        // Asked for again with the next look at it, which the way back of the server brings.
        this.dispatchEvent(new CustomEvent("away", { detail: error }));
      } else throw error;
    } finally {
      if (this.asked.get(page) === stop) this.asked.delete(page);
    }
  }

  /** The next place without a verdict, as the server knows it; null where there is none. */
  async next(after) {
    return (await ask("next", { ...this.name, after })).place;
  }

  /** Everything about one row, and what was thought of its picture. */
  whole(row, signal) {
    return ask("row", { generation: this.name.generation, row: row.row }, signal);
  }

  async siblings(row, by) {
    return (await ask("siblings", { generation: this.name.generation, row: row.row, by })).rows;
  }

  #forget() {
    if (this.pages.size <= KEPT_PAGES) return;
    const far = [...this.pages.keys()].sort(
      (one, other) => Math.abs(other - this.nearest) - Math.abs(one - this.nearest),
    );
    for (const page of far.slice(0, this.pages.size - KEPT_PAGES)) this.pages.delete(page);
  }
}
