// the live page: fetches changes and replaces changed parts, keeping filters, scroll positions and open details
const EVERY = 2000;
const page = document.querySelector("main");
const written = new Map();  // name of a part -> its HTML
const nameOf = (part) => part.dataset.part || part.id;
for (const part of page.children) written.set(nameOf(part), part.outerHTML);

function carryOver(before, after) {
  const pairs = (selector) => {
    const old = [...before.querySelectorAll(selector)];
    return [...after.querySelectorAll(selector)].map((node, i) => [old[i], node]).filter(([a]) => a);
  };
  for (const [a, b] of pairs("input, select")) b.value = a.value;
  for (const [a, b] of pairs("details")) b.open = a.open;
  const scrolled = pairs(".tall").map(([a, b]) => [b, a.scrollTop]);
  if (after.matches("[data-browse]")) browse(after);
  return () => scrolled.forEach(([node, top]) => { node.scrollTop = top; });
}

function put(fresh) {
  const parts = [...fresh.children];
  const present = new Map([...page.children].map((part) => [nameOf(part), part]));
  const same = parts.map(nameOf).join() === [...page.children].map(nameOf).join();
  const restore = [];
  const nodes = parts.map((part) => {
    const name = nameOf(part), old = present.get(name), text = part.outerHTML;
    if (old && (written.get(name) === text || old.contains(document.activeElement) && old.matches("[data-browse]"))) {
      return old;
    }
    written.set(name, text);
    if (old) restore.push(carryOver(old, part));
    else if (part.matches("[data-browse]")) browse(part);
    if (same) old.replaceWith(part);
    return part;
  });
  if (!same) page.replaceChildren(...nodes);
  restore.forEach((again) => again());
}

async function more(button) {
  button.disabled = true;
  const box = button.closest("[data-browse]"), body = box.querySelector("tbody");
  const next = Number(button.dataset.page || 1);
  try {
    const answer = await fetch(`rows?table=${button.dataset.more}&page=${next}`);
    if (answer.status !== 200) return;
    const html = `<table>${await answer.text()}</table>`;
    const rows = new DOMParser().parseFromString(html, "text/html").querySelectorAll("tr");
    body.append(...rows);
    button.dataset.page = next + 1;
    button.hidden = !rows.length || body.rows.length >= Number(button.dataset.total);
    box.dispatchEvent(new Event("change"));
  } finally {
    button.disabled = false;
  }
}
page.addEventListener("click", (event) => {
  const button = event.target.closest("[data-more]");
  if (button) more(button).catch(() => {});  // the banner says that the page is disconnected
});

async function refresh() {
  if (!document.hidden) {
    try {
      const answer = await fetch(`page?stamp=${encodeURIComponent(page.dataset.stamp)}`);
      if (answer.status === 200) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
        page.dataset.stamp = fresh.dataset.stamp;
        put(fresh);
      }
    } catch {
      const live = page.querySelector(".live");
      live.className = "live lost";
      live.querySelector("b").textContent = "disconnected";
      written.delete("live");
      page.dataset.stamp = "";  // the next answer is a whole page
    }
  }
  setTimeout(refresh, EVERY);
}
setTimeout(refresh, EVERY);
