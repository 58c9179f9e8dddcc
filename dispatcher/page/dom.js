// Small pieces for building and updating the page. Text from elsewhere only ever becomes text nodes and attributes,
// never markup; an update touches the DOM only where something changed.

export const $ = (id) => document.getElementById(id);

// el("span", {class: "x", hidden: true, "aria-label": "y"}, "text", child, ...)
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) put(element, name, value);
  element.append(...children.filter((child) => child !== undefined && child !== null));
  return element;
}

// Sets an attribute; null, undefined and false take it away.
export function put(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

// Replaces an element's text when it is another one. The last value is kept beside the element: reading it back from
// the document costs more than the comparison.
const said = new WeakMap();
export function say(element, value) {
  const text = value === null || value === undefined ? "" : String(value);
  if (said.get(element) === text) return;
  said.set(element, text);
  element.textContent = text;
}

// A custom property of one element: the content security policy forbids style attributes in markup, not this.
export function style(element, name, value) {
  if (element.style.getPropertyValue(name) !== value) element.style.setProperty(name, value);
}

// A list whose elements live as long as their keys: rows are made, updated, moved and taken away, never all rendered again.
export class Keyed {
  constructor(parent, make, update) {
    this.parent = parent;
    this.make = make;
    this.update = update;
    this.entries = new Map();
  }

  show(rows, keyOf) {
    const wanted = new Map();
    for (const row of rows) wanted.set(keyOf(row), row);
    for (const [key, entry] of this.entries) {
      if (wanted.has(key)) continue;
      entry.element.remove();
      this.entries.delete(key);
    }
    const elements = [];
    for (const [key, row] of wanted) {
      let entry = this.entries.get(key);
      if (!entry) {
        entry = this.make(row);
        this.entries.set(key, entry);
      }
      this.update(entry, row);
      elements.push(entry.element);
    }
    this.#order(elements);
  }

  // An element that is moved loses the focus, so the others move around the one that has it.
  #order(elements) {
    const held = elements.findIndex((element) => element.contains(document.activeElement));
    for (let n = held - 1; n >= 0; n--) {
      if (elements[n].nextElementSibling !== elements[n + 1]) this.parent.insertBefore(elements[n], elements[n + 1]);
    }
    let place = held < 0 ? this.parent.firstElementChild : elements[held].nextElementSibling;
    for (const element of elements.slice(held + 1)) {
      if (element === place) place = place.nextElementSibling;
      else this.parent.insertBefore(element, place);
    }
  }
}

// A button that is busy while its work goes on, so that a second press does nothing.
export function onPress(button, work) {
  button.addEventListener("click", async () => {
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true");
    try {
      await work();
    } finally {
      button.removeAttribute("aria-disabled");
    }
  });
}

// What a screen reader is told at once; used for losses and for answers to what somebody did, not for figures. Each has
// a line of its own: two that come together are both read, and the same one twice is read twice.
const SPOKEN_MS = 5000;
export function announce(text) {
  const line = el("p", {}, text);
  $("announce").append(line);
  setTimeout(() => line.remove(), SPOKEN_MS);
}

export function debounce(delay_ms, work) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, delay_ms);
  };
}
