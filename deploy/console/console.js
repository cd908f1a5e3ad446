"use strict";

const panel = document.getElementById("panel");

async function ask(method, path, body) {
  const headers = { "Content-Type": "application/json" };
  const reply = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  if (reply.ok) return "";
  const told = await reply.json().catch(() => ({}));
  return told.error || `The console answered ${reply.status}.`;
}

function sending(form, act) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true; // pressed twice, it is sent once
    const trouble = await act().catch(() => "The console does not answer.");
    if (!trouble) return location.assign("/");
    document.getElementById("answer").textContent = trouble;
    button.disabled = false;
  });
}

async function refresh() {
  // What has the focus is left alone: a page that moves under the fingers is worse than an old one.
  if (document.hidden || panel.contains(document.activeElement)) return;
  const reply = await fetch("/panel").catch(() => null);
  if (reply && reply.status === 401) return location.assign("/login");
  if (reply && reply.ok) panel.innerHTML = await reply.text();
}

function follow() {
  const live = document.getElementById("live");
  const stream = new EventSource("/api/events");
  stream.onopen = () => { live.textContent = "Live"; };
  stream.onerror = () => { live.textContent = "Not connected: what is shown may be old"; };
  for (const name of ["promotion", "trouble", "back"]) stream.addEventListener(name, refresh);
  setInterval(refresh, 3000);
}

const login = document.getElementById("login");
if (login) sending(login, () => ask("POST", "/session", { key: document.getElementById("key").value }));

const confirmed = document.getElementById("confirm");
if (confirmed) sending(confirmed, () => ask("POST", confirmed.dataset.action, JSON.parse(confirmed.dataset.wish)));

if (panel) {
  follow();
  document.getElementById("leave").addEventListener("click", async () => {
    await ask("DELETE", "/session");
    location.assign("/login");
  });
}
