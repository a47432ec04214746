// The list under review: its length, and its rows, fetched in pages before they are shown.
//
// A list is the rows of a filter with the verdicts up to one number. So it does not change while a
// reviewer works through it, and a restarted server returns the same list.

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
    this.stale = new Set();
    this.opened = 0;
  }

  /** Opens the list of a filter. Throws Refused for an invalid filter. */
  async open(selection) {
    const text = JSON.stringify(selection);
    const turn = ++this.opened;
    const found = await ask("view", { selection: text });
    if (turn !== this.opened) return false;
    for (const one of this.asked.values()) one.abort();
    this.asked.clear();
    this.pages.clear();
    this.stale.clear();
    this.selection = selection;
    this.name = { selection: text, number: found.number, generation: found.generation };
    this.count = found.count;
    return true;
  }

  row(place) {
    return this.pages.get(Math.floor(place / PAGE))?.[place % PAGE];
  }

  /** Fetches the rows again that are drawn next: many verdicts have changed. */
  reload() {
    this.stale = new Set(this.pages.keys());
  }

  /** Fetches the rows between two places, and the pages next to them. */
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
      if ((!this.pages.has(page) || this.stale.has(page)) && !this.asked.has(page)) this.#fetch(page);
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
      this.stale.delete(page);
      this.#forget();
      this.dispatchEvent(new CustomEvent("rows", { detail: found.rows }));
    } catch (error) {
      if (stop.signal.aborted) return;
      if (error instanceof Refused && error.status === 409) {
        this.dispatchEvent(new Event("changed"));
      } else if (error instanceof Away || error instanceof Refused) {
        // Requested again when the rows are drawn next, at the latest when the server is back.
        this.dispatchEvent(new CustomEvent("away", { detail: error }));
      } else throw error;
    } finally {
      if (this.asked.get(page) === stop) this.asked.delete(page);
    }
  }

  /** Returns the next place without a verdict on the server, or null. */
  async next(after) {
    return (await ask("next", { ...this.name, after })).place;
  }

  /** Returns all columns of a row, and the history of verdicts on its image. */
  whole(row, signal) {
    return ask("row", { generation: this.name.generation, row: row.row }, signal);
  }

  /** Returns the rows of the same prompt, or the similar ones, and what is to be said of them. */
  siblings(row, by) {
    return ask("siblings", { generation: this.name.generation, row: row.row, by });
  }

  #forget() {
    if (this.pages.size <= KEPT_PAGES) return;
    const far = [...this.pages.keys()].sort(
      (one, other) => Math.abs(other - this.nearest) - Math.abs(one - this.nearest),
    );
    for (const page of far.slice(0, this.pages.size - KEPT_PAGES)) this.pages.delete(page);
  }
}
