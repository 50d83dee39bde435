// One button on each page with code: fold all of it, or open it again; the next page keeps the choice.
document.addEventListener("DOMContentLoaded", () => {
  const cells = document.querySelectorAll("details.code:not(.solution):not(.check)");
  const title = document.querySelector("article h1");
  if (!cells.length || !title) return;
  const button = document.createElement("button");
  button.className = "fold-code";
  button.type = "button";
  const show = (open) => {
    cells.forEach((cell) => { cell.open = open; });
    button.textContent = open ? "Fold all code" : "Open all code";
    button.setAttribute("aria-pressed", String(!open));
  };
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-pressed") === "true";
    show(open);
    localStorage.setItem("code", open ? "open" : "folded");
  });
  show(localStorage.getItem("code") !== "folded");
  title.after(button);
});
