/* The playground: a form that becomes `POST /api/generate`, and its job followed to the pictures.

The form's names are the API's. What is wrong the API says, by JSON pointer: no bound of a request stands here. */

const ENDED = ["succeeded", "failed", "canceled", "expired"];
const LAYOUT = [
  "prompt", "template", "system_prompt", "thinking_content", "assistant_content", "force_think_block", "strip_quotes",
  "clean_whitespace", "long_prompt_mode",
];
const LOOK_EVERY_MS = 1000;
const COUNT_AFTER_MS = 300;
const PICTURES_KEPT = 24;
const KEY = "zimage.key";
const BELOW = matchMedia("(max-width: 800px)"); // the pictures stand below the form

const part = (id) => document.getElementById(id);
const form = part("request");
const addresses = {}; // of the inputs that were uploaded, or are outputs: by the request's field
let following = null; // the job that runs
let occupied = 0; // by uploads and the job: nothing is submitted meanwhile

/* The API. */

class Refused extends Error {
  constructor(detail, faults = []) {
    super(detail);
    this.faults = faults;
  }
}

/* It may answer later. */
class Unreachable extends Error {}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { ...options, headers }).catch((fault) => {
    throw fault.name === "AbortError" ? fault : new Unreachable("The server does not answer.");
  });
  const content = await answer.json().catch(() => ({}));
  const detail = content.detail ?? `The server answered ${answer.status}.`;
  if (answer.status >= 500) throw new Unreachable(detail);
  const atKey = answer.status === 401 && part("key") ? [{ pointer: "/key", detail }] : [];
  if (!answer.ok) throw new Refused(detail, content.errors ?? atKey);
  return content;
}

function post(path, body, options = {}) {
  const headers = { "content-type": "application/json" };
  return call(path, { method: "POST", body: JSON.stringify(body), headers, ...options });
}

/* An address of a job, reached under the name that this page has. */
const here = (url) => new URL(url).pathname;

/* The form. */

function requestOf(wanted = () => true) {
  const said = [...form.elements].filter((field) => field.name && wanted(field.name) && !field.closest("[hidden]"));
  const values = said.map((field) => [field.name, valueOf(field)]).filter(([, value]) => value !== undefined);
  return Object.fromEntries(values);
}

/* What a field says, undefined for nothing. What should be a number and is none goes as it is: the API refuses it. */
function valueOf(field) {
  if (field.type === "file") return addresses[field.name];
  if (field.type === "checkbox") return field.checked || undefined;
  if (field.validity.badInput) return "not a number";
  if (!field.value.trim()) return undefined;
  if (field.dataset.as === "json") return JSON.parse(field.value);
  return field.dataset.as === "number" ? numberOf(field.value.trim()) : field.value;
}

function numberOf(text) {
  const number = Number(text);
  return Number.isFinite(number) && Math.abs(number) <= Number.MAX_SAFE_INTEGER ? number : text;
}

function clearFaults() {
  for (const fault of form.querySelectorAll(".fault")) fault.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

/* Whether there was a field in sight to show it at. */
function showFault({ pointer, detail }) {
  const field = form.elements.namedItem(pointer.split("/")[1]);
  if (!field || field.closest("[hidden]")) return false;
  const shown = { className: "fault", id: `${field.id}-fault`, textContent: detail };
  const fault = Object.assign(document.createElement("p"), shown);
  part(fault.id)?.remove();
  field.closest(".field").append(fault);
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", fault.id);
  field.closest("details")?.setAttribute("open", "");
  return true;
}

/* Faults stand at their fields; a sentence says what stands nowhere else. */
function report(fault) {
  const faults = fault.faults ?? [];
  const homeless = faults.filter((one) => !showFault(one));
  const sentence = homeless.map(({ pointer, detail }) => `${pointer.slice(1)}: ${detail}`).join("; ");
  say(faults.length ? sentence || "Something in the form is not right." : fault.message, { refused: true });
  form.querySelector("[aria-invalid]")?.focus();
}

/* Templates and sizes. */

function group(label, options) {
  const element = Object.assign(document.createElement("optgroup"), { label });
  element.append(...options);
  return element;
}

const spoken = (name) => name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");

function fillTemplates({ templates }) {
  const categories = [...new Set(templates.map(({ category }) => category))];
  const groups = categories.map((wanted) => {
    const found = templates.filter(({ category }) => category === wanted);
    return group(spoken(wanted || "other"), found.map(({ name }) => new Option(spoken(name), name)));
  });
  const chooser = part("template");
  const chosen = chooser.value;
  chooser.replaceChildren(new Option("None", ""), ...groups);
  chooser.value = chosen;
  const descriptions = new Map(templates.map(({ name, description }) => [name, description]));
  chooser.onchange = () => {
    part("description").textContent = descriptions.get(chooser.value) ?? "";
  };
}

function fillSizes(sizes) {
  const { presets, ratios, resolutions, default: usual, limits } = sizes;
  const others = ratios.filter(({ ratio }) => !presets.some((preset) => preset.ratio === ratio));
  const called = (name, ratio) => (name === ratio ? ratio : `${ratio} ${name.split("_")[0]}`);
  const ratioOption = ({ name, ratio }) => new Option(called(name, ratio), ratio);
  part("aspect_ratio").replaceChildren(
    group("Shapes", presets.map(ratioOption)),
    group("Other ratios", others.map(ratioOption)),
    group("In pixels", [new Option("Width × height", "")]),
  );
  const payable = resolutions.filter((side) => side * side <= limits.max_pixels);
  part("resolution").replaceChildren(...payable.map((side) => new Option(`${side} × ${side}`, side)));
  part("resolution").value = Math.round(Math.sqrt(usual.width * usual.height));
  const same = ratios.find(({ width, height }) => width === usual.width && height === usual.height);
  part("aspect_ratio").value = same?.ratio ?? "";
  chooseSize();
}

function chooseSize() {
  const bySides = !part("aspect_ratio").value;
  for (const field of form.querySelectorAll(".by-sides")) field.hidden = !bySides;
  for (const field of form.querySelectorAll(".by-ratio")) field.hidden = bySides;
}

async function load() {
  clearFaults();
  if (part("key") && !sessionStorage.getItem(KEY)) return say("Give your API key to begin.");
  try {
    const [templates, sizes] = await Promise.all([call("/api/templates"), call("/api/sizes")]);
    fillTemplates(templates);
    fillSizes(sizes);
    say("");
  } catch (fault) {
    report(fault);
  }
}

/* The token count. */

let counting = new AbortController();

function countSoon() {
  counting.abort();
  counting = new AbortController();
  const { signal } = counting;
  setTimeout(() => signal.aborted || count(signal), COUNT_AFTER_MS);
}

async function count(signal) {
  const request = requestOf((name) => LAYOUT.includes(name));
  if (!request.prompt) return showCount({});
  try {
    showCount(await post("/api/format-prompt", request, { signal }));
  } catch (fault) {
    if (!signal.aborted) showCount({}); // what is wrong is said when it matters: at Generate
  }
}

function showCount({ tokens, limit, long_prompt_mode: mode }) {
  const over = limit != null && tokens > limit;
  const counted = limit == null ? `${tokens} tokens` : `${tokens} of ${limit} tokens`;
  const judged = over ? `${counted}: too long (${mode.replace("_", " ")})` : counted;
  part("tokens").textContent = tokens == null ? "" : judged;
  part("tokens").classList.toggle("over", over);
}

/* Inputs: uploaded as they are chosen. */

async function upload(field) {
  const [file] = field.files;
  if (!file) return;
  clearFaults();
  occupy(+1);
  try {
    const headers = { "content-type": file.type || "application/octet-stream" };
    const { id } = await call("/api/inputs", { method: "POST", body: file, headers });
    give(field, id, URL.createObjectURL(file));
  } catch (fault) {
    take(field);
    showFault({ pointer: `/${field.name}`, detail: fault.faults?.[0]?.detail ?? fault.message });
  } finally {
    occupy(-1);
  }
}

function give(field, address, picture) {
  addresses[field.name] = address;
  showInput(field, picture);
}

function take(field) {
  delete addresses[field.name];
  field.value = "";
  showInput(field, "");
}

function showInput(field, picture) {
  const [thumbnail, remove] = field.parentElement.querySelectorAll("img, button");
  if (thumbnail.src.startsWith("blob:")) URL.revokeObjectURL(thumbnail.src);
  picture ? thumbnail.setAttribute("src", picture) : thumbnail.removeAttribute("src");
  thumbnail.hidden = remove.hidden = !picture;
  part("with-image").hidden = !addresses.image;
}

/* The job. */

async function generate(event) {
  event.preventDefault();
  if (occupied) return;
  clearFaults();
  occupy(+1);
  try {
    say("Submitting…");
    show(await follow(await post("/api/generate", requestOf())));
    turnToPictures();
  } catch (fault) {
    report(fault);
  } finally {
    part("cancel").disabled = true;
    part("progress").hidden = true;
    occupy(-1);
  }
}

function occupy(by) {
  occupied += by;
  part("generate").disabled = occupied > 0;
}

async function follow(job) {
  following = job;
  part("cancel").disabled = false;
  turnToPictures();
  while (!ENDED.includes(following.status)) {
    showProgress(following);
    await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY_MS));
    following = await look(following);
  }
  return following;
}

/* The job of now; the same as before where the server does not answer for a while. */
async function look(job) {
  try {
    return await call(here(job.urls.self));
  } catch (fault) {
    if (!(fault instanceof Unreachable)) throw fault;
    return job;
  }
}

async function cancel() {
  await call(here(following.urls.cancel), { method: "POST" }).catch(report);
}

function turnToPictures() {
  if (BELOW.matches) part("outcome").scrollIntoView();
}

function say(sentence, { refused = false } = {}) {
  part("said").textContent = sentence;
  part("state").hidden = !sentence;
  part("state").classList.toggle("refused", refused);
  part("nothing-yet").hidden = Boolean(sentence) || part("pictures").childElementCount > 0;
}

function showProgress({ status, progress, queue_position: position, cancel_requested_at: canceling }) {
  const bar = part("progress");
  bar.hidden = false;
  progress ? (bar.value = progress.fraction) : bar.removeAttribute("value");
  if (canceling) say("Canceling…");
  else if (status === "queued") say(position > 1 ? `Queued: number ${position}` : "Queued: next in the queue");
  else if (progress) say(`${spoken(progress.phase)}: step ${progress.step} of ${progress.steps}`);
  else say("Running");
}

/* The pictures. */

function show(job) {
  const figures = job.outputs.filter(({ url }) => url).map((output) => figureOf(job, output));
  if (job.status === "succeeded") {
    part("pictures").replaceChildren(...figures);
    keep(job);
  }
  const ends = {
    failed: `Failed: ${job.error?.message}`,
    canceled: "Canceled.",
    expired: "The pictures were deleted after their time.",
  };
  say(ends[job.status] ?? "", { refused: job.status === "failed" });
}

function figureOf(job, output) {
  const figure = part("picture").content.cloneNode(true).firstElementChild;
  const [image, facts, save] = ["img", ".facts-line", ".save"].map((selector) => figure.querySelector(selector));
  Object.assign(image, { src: output.url, width: output.width, height: output.height, alt: job.request.prompt });
  facts.textContent = `Seed ${output.seed} · ${output.width} × ${output.height} · ${job.request.steps} steps`;
  Object.assign(save, { href: output.url, download: `${job.id}-${output.index}.${output.format}` });
  figure.querySelector(".again").onclick = () => useSeed(output.seed);
  figure.querySelector(".onward").onclick = () => startFrom(job, output);
  return figure;
}

function useSeed(seed) {
  part("seed").value = seed;
  part("seed").focus();
}

function startFrom(job, output) {
  part("image").value = "";
  give(part("image"), `output:${job.id}/${output.index}`, output.url);
  part("strength").focus();
}

/* A thumbnail leads back to its job, whose links are fresh then. */
function keep(job) {
  const strip = part("strip");
  if (strip.querySelector(`[data-job="${job.id}"]`)) return;
  for (const output of job.outputs) {
    const thumbnail = part("thumbnail").content.cloneNode(true).firstElementChild;
    thumbnail.dataset.job = job.id;
    const alt = `${job.request.prompt}, seed ${output.seed}`;
    Object.assign(thumbnail.querySelector("img"), { src: output.url, alt });
    thumbnail.querySelector("button").onclick = () => call(here(job.urls.self)).then(show, report);
    strip.prepend(thumbnail);
  }
  while (strip.childElementCount > PICTURES_KEPT) strip.lastElementChild.remove();
  part("session").hidden = false;
}

/* What the page reacts to. */

form.addEventListener("submit", generate);
form.addEventListener("input", countSoon);
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
part("cancel").addEventListener("click", cancel);
part("aspect_ratio").addEventListener("change", chooseSize);
for (const field of form.querySelectorAll("input[type=file]")) {
  field.addEventListener("change", () => upload(field));
  field.parentElement.querySelector(".remove").addEventListener("click", () => take(field));
}
part("strength").addEventListener("input", showStrength);
part("key")?.addEventListener("change", ({ target }) => {
  sessionStorage.setItem(KEY, target.value.trim());
  load();
});

function showStrength() {
  part("strength-shown").textContent = Number(part("strength").value).toFixed(2);
}

if (part("key")) part("key").value = sessionStorage.getItem(KEY) ?? "";
showStrength();
countSoon();
load();
