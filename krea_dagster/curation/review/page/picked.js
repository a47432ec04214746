// The images that are selected together, by their places in the list.

export class Picked extends EventTarget {
  #places = new Set();
  /** Where a range begins: the place that was chosen or toggled last. */
  anchor = 0;

  get size() {
    return this.#places.size;
  }

  has(place) {
    return this.#places.has(place);
  }

  toggle(place) {
    if (!this.#places.delete(place)) this.#places.add(place);
    this.anchor = place;
    this.#changed();
  }

  /** Adds all places from the anchor to this one. */
  extend(place) {
    this.#add(Math.min(this.anchor, place), Math.max(this.anchor, place));
  }

  all(count) {
    this.#add(0, count - 1);
  }

  clear() {
    if (!this.#places.size) return;
    this.#places.clear();
    this.#changed();
  }

  places() {
    return [...this.#places].sort((one, other) => one - other);
  }

  /** Returns the places as pairs of the first and the last of each range. */
  ranges() {
    const found = [];
    for (const place of this.places()) {
      const last = found.at(-1);
      if (last && last[1] === place - 1) last[1] = place;
      else found.push([place, place]);
    }
    return found;
  }

  #add(first, last) {
    for (let place = first; place <= last; place++) this.#places.add(place);
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("picked"));
  }
}
