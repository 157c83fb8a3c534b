// Reads charts out: the values at the step under the pointer or finger, or at the one that the arrow keys reach.
for (const figure of document.querySelectorAll(".chart")) {
  const {low, high, lines} = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot"), cursor = figure.querySelector(".cursor"), out = figure.querySelector("output");
  const steps = [...new Set(lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  let at = steps.length - 1;
  const number = (value) =>
    value && Math.abs(value) < 1e-3 ? value.toExponential(2) : value.toLocaleString("en", {maximumSignificantDigits: 5});
  const nearest = (points, step) => points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
  const text = ({name, points}, step) => {
    const [x, mean, least, greatest] = nearest(points, step);
    const extent = least < greatest ? ` (${number(least)} to ${number(greatest)})` : "";
    const figure = mean === null ? "not finite" : number(mean) + extent;
    return [name, figure, x === step ? "" : `at ${x.toLocaleString("en")}`].filter(Boolean).join(" ");
  };
  const show = (index, seen = true) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    out.textContent = [`step ${steps[at].toLocaleString("en")}`, ...lines.map((line) => text(line, steps[at]))].join(" · ");
    cursor.hidden = !seen;
    cursor.style.left = `${(100 * (steps[at] - low)) / (high - low)}%`;
  };
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    const step = low + ((event.clientX - box.left) / box.width) * (high - low);
    show(steps.indexOf(nearest(steps.map((value) => [value]), step)[0]));
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", () => show(steps.length - 1, false));
  plot.addEventListener("keydown", (event) => {
    const moves = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1};
    if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    }
  });
  show(at, false);
}
