// filters of the prompt tables
function browse(box) {
  const inputs = [...box.querySelectorAll("input, select")];
  const shown = box.querySelector("[data-shown]");
  const filter = () => {
    const rows = [...box.querySelectorAll("tbody tr")];
    let n = 0;
    for (const row of rows) {
      row.hidden = !inputs.every((input) => {
        const want = input.value.toLowerCase();
        return !want || (input.name ? row.dataset[input.name] === input.value
          : row.textContent.toLowerCase().includes(want));
      });
      n += !row.hidden;
    }
    shown.textContent = `${n} of ${rows.length} shown`;
  };
  for (const kind of ["input", "change"]) box.addEventListener(kind, filter);
  filter();
}
document.querySelectorAll("[data-browse]").forEach(browse);
