// The verdicts: the current one of each image, and those given here that are not saved yet.
//
// A verdict gets an id when the key is pressed, and stays in this browser's storage until the server
// confirms that it is in the journal. Until then it is posted again. The id makes that safe: the
// journal stores each id once.

import { Away, Refused, ask, post } from "./api.js";

const MOST_AT_ONCE = 100;
/** Characters of one post: the server reads at most a million bytes, and a prompt_id may be long. */
const LONGEST_POST = 200_000;
const POLL_MS = 1500;
const POLL_HIDDEN_MS = 15000;
const MOST_UNDO = 1000;
/** A batch of 100,000 images takes half a minute, on a busy machine several. */
const BATCH_MS = 900000;

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (one) => one.toString(16).padStart(2, "0")).join("");
}

/** Returns what holds once an entry is saved; without a verdict, the one before stays. */
function shown(entry, before) {
  const kept = before?.tags ?? [];
  const tags = [...new Set([...kept, ...(entry.tag ?? [])])].filter((one) => !entry.untag?.includes(one));
  const note = (entry.note ?? before?.note) || null;
  const { verdict, reason, reviewer } = entry.verdict === null ? { verdict: "none", ...before } : entry;
  return { ...entry, verdict, reason, reviewer, note, tags: tags.sort() };
}

export class Verdicts extends EventTarget {
  #journal = "";
  #prefix = "";
  #waiting = new Map();
  /** The newest verdict of each image from the server, and those that are not saved yet. */
  #heard = new Map();
  #pending = new Map();
  #given = [];
  /** The ids of verdicts given in this page: a later one of somebody else is not undone. */
  #own = new Set();
  #busy = false;
  #failed = 0;
  #timer = 0;
  #clock = 0;

  constructor() {
    super();
    this.reviewer = "";
    this.number = 0;
  }

  /** Starts. `journal` separates this journal's verdicts from those of another on the same port. */
  start(journal, number) {
    this.#journal = journal;
    this.#prefix = `krea-review:${journal}:`;
    this.number = number;
    for (const entry of this.#left()) {
      this.#waiting.set(entry.verdict_id, entry);
      this.#pending.set(entry.image_sha256, shown(entry, this.#pending.get(entry.image_sha256)));
    }
    addEventListener("online", () => this.#flush());
    document.addEventListener("visibilitychange", () => this.#poll());
    addEventListener("beforeunload", (event) => {
      if (this.#waiting.size) event.preventDefault();
    });
    this.#flush();
    this.#timer = setTimeout(() => this.#poll(), POLL_MS);
  }

  get waiting() {
    return this.#waiting.size;
  }

  get canUndo() {
    return this.#given.length > 0;
  }

  /** Returns the verdict on a row's image, or null. */
  of(row) {
    const found = this.about(row);
    return found?.verdict === "none" ? null : found;
  }

  /** Returns what was said last of a row's image: a verdict, maybe `none`, with tags and note. */
  about(row) {
    return row?.image_sha256 ? this.#last(row) : null;
  }

  /** Returns the last known verdict on a row's image, including one that takes another back. */
  #last({ image_sha256, verdict }) {
    return this.#pending.get(image_sha256) ?? this.#heard.get(image_sha256) ?? verdict;
  }

  /** Adopts the verdicts of rows where no newer one is known. */
  learnFrom(rows) {
    for (const row of rows) if (row.verdict) this.#learn(row.verdict);
  }

  give(row, verdict, reason = null) {
    this.#remember({ row, before: this.about(row) });
    this.#enter(row, { verdict, reason });
  }

  /** Adds and removes tags of an image, or sets its note; its verdict stays. */
  annotate(row, { tag = [], untag = [], note = null }) {
    this.#remember({ row, before: this.about(row), annotates: true });
    this.#enter(row, { verdict: null, tag, untag, note });
  }

  /** Says the same of the images at some places of a list, in one commit; returns their number. */
  async batch(name, ranges, said) {
    const batch_id = newId();
    const posted = { ...name, ...said, ranges, batch_id, reviewer: this.reviewer, journal: this.#journal };
    const { images } = await post("batch", posted, BATCH_MS);
    this.#remember({ batch: batch_id });
    return images;
  }

  #remember(given) {
    this.#given.push(given);
    if (this.#given.length > MOST_UNDO) this.#given.shift();
  }

  /** Waits until all verdicts are saved, or the server is unavailable. */
  async settled() {
    let away = false;
    while (this.#waiting.size && !away) {
      await new Promise((resolve) => {
        const saved = () => {
          this.removeEventListener("away", failed);
          resolve();
        };
        const failed = () => {
          this.removeEventListener("saved", saved);
          away = true;
          resolve();
        };
        this.addEventListener("saved", saved, { once: true });
        this.addEventListener("away", failed, { once: true });
      });
    }
  }

  /**
   * Restores what was said before the last thing done here, and returns its row, or for a batch the
   * number of images. Where somebody else has said something since, that stays, and `since` names
   * them, or is their number.
   */
  async undo() {
    const last = this.#given.pop();
    if (!last) return null;
    if (last.batch) {
      const posted = { undo: last.batch, batch_id: newId(), reviewer: this.reviewer, journal: this.#journal };
      try {
        return await post("batch", posted, BATCH_MS);
      } catch (error) {
        this.#given.push(last);
        throw error;
      }
    }
    const { row, before, annotates } = last;
    const now = this.#last(row);
    if (now && !this.#own.has(now.verdict_id)) return { ...row, since: now.reviewer };
    if (annotates) {
      const tags = { before: before?.tags ?? [], now: now?.tags ?? [] };
      this.#enter(row, {
        verdict: null,
        tag: tags.before.filter((one) => !tags.now.includes(one)),
        untag: tags.now.filter((one) => !tags.before.includes(one)),
        note: before?.note ?? "",
      });
    } else this.#enter(row, { verdict: before?.verdict ?? "none", reason: before?.reason ?? null });
    return row;
  }

  #enter(row, said) {
    const entry = {
      verdict_id: newId(),
      image_sha256: row.image_sha256,
      ...said,
      reviewer: this.reviewer,
      request_key: row.request_key,
      prompt_id: row.prompt_id,
      sample: row.sample,
      attempt: row.attempt,
      partition_key: row.partition_key,
      // Increases across pages and tabs of this browser: the next page sends what one left unsaved.
      order: (this.#clock = Math.max(Date.now(), this.#clock + 1)),
    };
    this.#own.add(entry.verdict_id);
    this.#waiting.set(entry.verdict_id, entry);
    try {
      localStorage.setItem(this.#prefix + entry.verdict_id, JSON.stringify(entry));
    } catch {
      // Full or forbidden: it is still in the page's memory.
    }
    const before = this.of(row);
    this.#pending.set(row.image_sha256, shown(entry, this.about(row)));
    this.dispatchEvent(new CustomEvent("given", { detail: { row, before, after: this.of(row) } }));
    this.#changed([row.image_sha256]);
    this.#flush();
  }

  async #flush() {
    if (this.#busy || !this.#waiting.size) return;
    this.#busy = true;
    try {
      while (this.#waiting.size) {
        const answer = await post("verdicts", { journal: this.#journal, verdicts: this.#batch() });
        for (const one of answer.verdicts) this.#saved(one);
        for (const one of answer.refused) this.#refused(one);
        this.#failed = 0;
        this.dispatchEvent(new Event("saved"));
      }
    } catch (error) {
      if (!(error instanceof Away || error instanceof Refused)) throw error;
      this.#failed += 1;
      const wait_ms = Math.min(5000, 250 * 2 ** Math.min(this.#failed, 6));
      setTimeout(() => this.#flush(), wait_ms);
      this.dispatchEvent(new CustomEvent("away", { detail: error }));
    } finally {
      this.#busy = false;
    }
  }

  /** Returns the oldest unsaved verdicts that fit one post. */
  #batch() {
    const batch = [];
    let length = 0;
    for (const entry of this.#waiting.values()) {
      length += JSON.stringify(entry).length;
      if (batch.length && (batch.length === MOST_AT_ONCE || length > LONGEST_POST)) break;
      batch.push(entry);
    }
    return batch;
  }

  #saved(one) {
    this.#drop(one.verdict_id);
    this.#learn(one);
    this.#changed([one.image_sha256]);
  }

  #refused({ verdict_id, why }) {
    const entry = this.#waiting.get(verdict_id);
    this.#drop(verdict_id);
    if (entry) this.#changed([entry.image_sha256]);
    this.dispatchEvent(new CustomEvent("refused", { detail: why }));
  }

  #drop(id) {
    const entry = this.#waiting.get(id);
    this.#waiting.delete(id);
    if (this.#pending.get(entry?.image_sha256)?.verdict_id === id) this.#pending.delete(entry.image_sha256);
    try {
      localStorage.removeItem(this.#prefix + id);
    } catch {
      // As above.
    }
  }

  #learn(one) {
    const heard = this.#heard.get(one.image_sha256);
    if (heard && heard.number >= one.number) return false;
    this.#heard.set(one.image_sha256, one);
    return true;
  }

  /** Returns the verdicts that an earlier page of this browser left unsaved, oldest first. */
  #left() {
    const found = [];
    try {
      for (const key of Object.keys(localStorage)) {
        if (key.startsWith(this.#prefix)) found.push(JSON.parse(localStorage.getItem(key)));
      }
    } catch {
      // Forbidden, or not written by this page: what was read so far is sent.
    }
    found.sort((one, other) => one.order - other.order);
    this.#clock = Math.max(0, ...found.map((one) => one.order));
    return found;
  }

  /** Polls for the verdicts of others. */
  async #poll() {
    clearTimeout(this.#timer);
    try {
      const found = await ask("since", { number: this.number, journal: this.#journal });
      this.number = found.number;
      const news = found.verdicts.filter((one) => this.#learn(one));
      if (news.length) this.#changed(news.map((one) => one.image_sha256));
      if (found.many) this.dispatchEvent(new Event("many"));
      this.dispatchEvent(new CustomEvent("heard", { detail: found.generation }));
      if (this.#waiting.size) this.#flush();
    } catch (error) {
      if (!(error instanceof Away || error instanceof Refused)) throw error;
      this.dispatchEvent(new CustomEvent("away", { detail: error }));
    } finally {
      clearTimeout(this.#timer);
      const wait_ms = document.hidden ? POLL_HIDDEN_MS : POLL_MS;
      this.#timer = setTimeout(() => this.#poll(), wait_ms);
    }
  }

  #changed(shas) {
    this.dispatchEvent(new CustomEvent("verdicts", { detail: new Set(shas) }));
  }
}
