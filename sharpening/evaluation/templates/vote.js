"use strict";
// `pairs` are {prompt, left, right}; who drew which is not in this page.
const { study, pairs } = JSON.parse(document.getElementById("data").textContent);
const PLACE = `blind-study-${study}`;
const KEYS = {
  ArrowLeft: () => vote("left"),
  ArrowRight: () => vote("right"),
  ArrowDown: () => vote("tie"),
  " ": () => vote("tie"),
  u: undo,
  s: save,
};
const find = (id) => document.getElementById(id);

let ballot = kept() ?? empty();

function empty() {
  const voter = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { study, voter, votes: [] };
}

// What this browser kept of this study, or null.
function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(PLACE));
    return Array.isArray(found?.votes) && found.votes.length <= pairs.length ? found : null;
  } catch {
    return null;
  }
}

function keep() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(ballot));
  } catch {
    find("warning").textContent = "This browser does not keep the votes: save them before you close the page.";
  }
}

function vote(choice) {
  if (ballot.votes.length === pairs.length) return;
  ballot.votes.push(choice);
  keep();
  show();
}

function undo() {
  ballot.votes.pop();
  keep();
  show();
}

function save() {
  if (!ballot.votes.length) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(ballot)], { type: "application/json" }));
  link.download = `votes-${study}-${ballot.voter}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  find("again").hidden = ballot.votes.length < pairs.length;
}

function show() {
  const done = ballot.votes.length;
  const finished = done === pairs.length;
  find("bar").max = pairs.length;
  find("bar").value = done;
  find("progress").textContent = finished ? `all ${done} pairs` : `pair ${done + 1} of ${pairs.length}`;
  find("question").hidden = finished;
  find("end").hidden = !finished;
  find("again").hidden = true;
  find("undo").disabled = find("save").disabled = done === 0;
  if (finished) {
    find("save").focus();
    return;
  }
  find("prompt").textContent = pairs[done].prompt;
  for (const side of ["left", "right"]) {
    const image = find(side);
    image.alt = `${side} image: ${pairs[done].prompt}`;
    image.src = pairs[done][side];
    image.decode().then(() => image.classList.toggle("tiny", image.naturalWidth < 200), () => {});
  }
}

document.addEventListener("keydown", (event) => {
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  // A held key votes once; space on a button that has the focus presses the button.
  const pressing = event.key === " " && event.target instanceof HTMLButtonElement;
  if (!act || pressing || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  if (!event.repeat) act();
});
function onClick(button, act) {
  button.addEventListener("click", (event) => {
    if (event.detail > 0) button.blur(); // by mouse or touch: the next space means a tie again
    act();
  });
}
for (const button of document.querySelectorAll("[data-choice]")) onClick(button, () => vote(button.dataset.choice));
onClick(find("undo"), undo);
onClick(find("save"), save);
onClick(find("again"), () => {
  ballot = empty();
  keep();
  show();
});
keep();
show();
