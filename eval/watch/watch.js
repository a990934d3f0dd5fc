"use strict";
// Asks for the sections that have changed, and puts them in the place of the old ones. Groups that someone
// reads (one is open) stay until they are closed, or until the button is pressed.
const EVERY_MS = 2000;
const PATIENCE_MS = 20000;
const part = (id) => document.getElementById(id);
const all = (choice, within = document) => [...within.querySelectorAll(choice)];
let waiting = null; // groups that are newer than those that are read
let heardAt = Date.now();

function wanted() {
  const known = new URLSearchParams();
  for (const section of all("[data-version]")) {
    if (section.id === "more" && !part("fold").open) continue;
    known.set(section.id, section.id === "groups" && waiting ? waiting.version : section.dataset.version);
  }
  return known;
}

function put(name, section) {
  const place = part(name);
  place.innerHTML = section.html; // escaped by the server; the page's policy lets nothing in it act
  place.dataset.version = section.version;
}

function putGroups(section) {
  waiting = null;
  part("newer").hidden = true;
  put("groups", section);
  for (const label of all("[data-count]")) label.textContent = section.counts[label.dataset.count];
  filter();
}

function show(sections) {
  for (const [name, section] of Object.entries(sections)) {
    if (name !== "groups") {
      put(name, section);
    } else {
      waiting = section;
    }
  }
  if (waiting && !all("#groups details.group[open]").length) putGroups(waiting);
  if (waiting) {
    part("newer").textContent = "newer groups are there: show them";
    part("newer").hidden = false;
  }
}

function filter() {
  const chosen = all("[data-filter]").filter((box) => box.checked).map((box) => box.dataset.filter);
  const outcome = part("outcome").value;
  const join = part("join").value === "all" ? "every" : "some";
  const groups = all("#groups > details.group");
  let numShown = 0;
  for (const group of groups) {
    const articles = all("article", group);
    for (const article of articles) {
      const matches = !chosen.length || chosen[join]((name) => article.classList.contains(name));
      article.classList.toggle("other", !matches);
    }
    const isShown = (!chosen.length || articles.some((one) => !one.classList.contains("other")))
      && (!outcome || group.classList.contains(outcome));
    group.hidden = !isShown;
    numShown += isShown;
  }
  part("groups").classList.toggle("only", part("only").checked);
  part("shown").textContent = groups.length ? `${numShown} of ${groups.length} groups` : "";
}

function tell(words) {
  part("lost").hidden = !words;
  part("lost").textContent = words;
}

async function refresh() {
  try {
    const answer = await fetch(`sections?${wanted()}`, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(await answer.text());
    show(await answer.json());
    heardAt = Date.now();
    tell("");
  } catch (error) {
    const seconds = Math.round((Date.now() - heardAt) / 1000);
    tell(`Nothing new for ${seconds} s: ${error.message}. Does sd-search watch still run? This page asks again.`);
  }
}

async function follow() {
  if (!document.hidden) await refresh();
  setTimeout(follow, EVERY_MS);
}

for (const choice of all("[data-filter], #join, #outcome, #only")) choice.addEventListener("change", filter);
part("newer").addEventListener("click", () => putGroups(waiting));
part("fold").addEventListener("toggle", refresh);
document.addEventListener("visibilitychange", () => document.hidden || refresh());
filter();
follow();
