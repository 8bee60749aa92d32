// The panels at the sides, the parameters in them, and the dialog that asks for the key.

import { key, saveSettings, settings, theme } from "./store.js";
import { $, element } from "./view.js";

const wide = matchMedia("(min-width: 900px)");

const PARAMETERS = [
  { name: "temperature", label: "Temperature", low: 0, high: 2, step: 0.05, help: "low is predictable, high is varied" },
  { name: "top_p", label: "Top-p", low: 0.01, high: 1, step: 0.01, help: "share of the odds to choose from" },
  { name: "max_tokens", label: "Max tokens", low: 1, high: 4096, step: 1, help: "of an answer" },
  { name: "top_k", label: "Top-k", low: 0, high: 200, step: 1, help: "tokens to choose from; 0 is all", more: true },
  { name: "min_p", label: "Min-p", low: 0, high: 1, step: 0.01, help: "least odds beside the likeliest", more: true },
  { name: "repetition_penalty", label: "Repetition penalty", low: 0.5, high: 2, step: 0.01, help: "1 is none", more: true },
  { name: "presence_penalty", label: "Presence penalty", low: -2, high: 2, step: 0.1, help: "0 is none", more: true },
  { name: "frequency_penalty", label: "Frequency penalty", low: -2, high: 2, step: 0.1, help: "0 is none", more: true },
  { name: "seed", label: "Seed", low: 0, step: 1, help: "the same gives the same", more: true },
];

/** What the parameters add to a request's body. */
export function chosen() {
  const stop = settings.stop.split("\n").filter(Boolean);
  return { ...settings.parameters, ...(stop.length ? { stop } : {}) };
}

/** A panel stands beside the chat on wide screens, as `settings[kept]` says, and over it on narrow ones. */
function panel(dialog, opener, kept) {
  const show = (open) => {
    if (dialog.open) dialog.close();
    if (open && wide.matches) dialog.open = true;
    else if (open) dialog.showModal();
    opener.ariaExpanded = String(open);
    document.body.classList.toggle(`with-${dialog.id}`, open && wide.matches);
  };
  const toggle = (open) => {
    if (wide.matches) {
      settings[kept] = open;
      saveSettings();
    }
    show(open);
  };
  opener.addEventListener("click", () => toggle(!dialog.open));
  dialog.querySelector("[data-close]").addEventListener("click", () => toggle(false));
  dialog.addEventListener("close", () => (opener.ariaExpanded = "false"));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && !wide.matches) dialog.close(); // beside the panel
  });
  wide.addEventListener("change", () => show(wide.matches && settings[kept]));
  show(wide.matches && settings[kept]);
}

/** Wires everything; changedSystem(text) when the system prompt is edited, changedKey() when the key is. */
export function setUp({ changedSystem, changedKey }) {
  panel($("sidebar"), $("open-sidebar"), "sidebar");
  panel($("settings"), $("open-settings"), "panel");
  for (const parameter of PARAMETERS) {
    $(parameter.more ? "more-parameters" : "main-parameters").append(field(parameter));
  }
  $("parameters").addEventListener("submit", (event) => event.preventDefault());
  $("system").addEventListener("input", () => changedSystem($("system").value));
  $("stop-texts").value = settings.stop;
  $("stop-texts").addEventListener("input", () => {
    settings.stop = $("stop-texts").value;
    saveSettings();
  });
  $("reset").addEventListener("click", () => {
    settings.parameters = {};
    settings.stop = $("stop-texts").value = "";
    saveSettings();
    for (const parameter of PARAMETERS) parameter.show();
  });
  for (const choice of $("themes").querySelectorAll("input")) {
    choice.checked = choice.value === theme.get();
    choice.addEventListener("change", () => theme.set(choice.value));
  }
  setUpKey(changedKey);
}

/** The most tokens that the model holds bound the slider. */
export function setLimit(tokens) {
  const parameter = PARAMETERS.find(({ name }) => name === "max_tokens");
  parameter.slider.max = Math.min(tokens, 32768);
  parameter.show();
}

function field(parameter) {
  const { name, label, low, high, step, help } = parameter;
  const number = element("input");
  Object.assign(number, { type: "number", min: low, max: high ?? "", step, placeholder: "auto", id: `parameter-${name}` });
  const title = element("label", "", label);
  title.htmlFor = number.id;
  const slider = element("input");
  const row = element("div", "parameter", title, number);
  if (high !== undefined) {
    Object.assign(slider, { type: "range", min: low, max: high, step, tabIndex: -1 }); // the number is for the keyboard
    slider.ariaHidden = "true";
    row.append(slider);
  }
  row.append(element("small", "", help));
  if (name === "max_tokens") number.max = "";
  parameter.slider = slider;
  parameter.show = () => {
    const value = settings.parameters[name];
    number.value = value ?? "";
    slider.value = value ?? (low + Number(slider.max || 0)) / 2;
    slider.style.setProperty("--at", `${(100 * (slider.value - low)) / (slider.max - low)}%`);
    row.classList.toggle("auto", value === undefined);
    row.classList.remove("wrong");
  };
  const change = (text) => {
    const value = Number(text);
    if (text === "") delete settings.parameters[name];
    else settings.parameters[name] = value;
    saveSettings();
    parameter.show();
  };
  slider.addEventListener("input", () => change(slider.value));
  number.addEventListener("change", () => {
    if (number.validity.badInput || number.validity.rangeUnderflow || number.validity.rangeOverflow) {
      row.classList.add("wrong");
    } else change(number.value === "" || step !== 1 ? number.value : String(Math.round(Number(number.value))));
  });
  parameter.show();
  return row;
}

function setUpKey(changedKey) {
  const dialog = $("key-dialog");
  $("ask-key").addEventListener("click", () => askForKey(""));
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const value = $("key-input").value.trim();
    if (/[^\x21-\x7e]/.test(value)) {
      $("key-reason").textContent = "A key has no spaces and no letters beyond ASCII.";
      return;
    }
    key.set(value, $("key-keep").checked);
    dialog.close();
    changedKey();
  });
}

/** Asks for the key; reason: why, in a sentence. */
export function askForKey(reason) {
  $("key-reason").textContent = reason || "It is sent with every request to this server and to no other.";
  $("key-input").value = key.get();
  $("key-keep").checked = key.kept();
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key-input").select();
}
