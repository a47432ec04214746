// Creates elements. All content is added as text, never as markup.

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value") made.value = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

export const count = (number) => number.toLocaleString("en");

/** Counts things in words: "1 image", "5,000 images". */
export const many = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

let noticed = 0;
/** Shows and announces a text for some seconds. */
export function notice(words) {
  const bar = byId("notice");
  bar.textContent = words;
  bar.hidden = false;
  say(words);
  clearTimeout(noticed);
  noticed = setTimeout(() => (bar.hidden = true), 6000);
}

/** Announces a text to screen readers, also when it is the same as before. */
export function say(words) {
  const live = byId("live");
  live.textContent = live.textContent === words ? `${words}\u00a0` : words;
}

export const WORDS = { keep: "Kept", reject: "Rejected", flag: "Flagged", none: "No verdict" };
export const SIGNS = { keep: "✓", reject: "✕", flag: "⚑", none: "" };

/** Names an image: the beginning of its prompt, with its sample and attempt. */
export function named(row) {
  const words = row.prompt.length > 80 ? `${row.prompt.slice(0, 79)}…` : row.prompt;
  const which = row.sample ? `, sample ${row.sample}` : "";
  const again = row.attempt ? `, attempt ${row.attempt}` : "";
  return `${words}${which}${again}`;
}

/** Debounces a function: it runs once there was no call for `wait_ms`. */
export function quiet(wait_ms, run) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(run, wait_ms, ...given);
  };
}
