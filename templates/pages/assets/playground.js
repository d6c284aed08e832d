/* The playground: submits its form to `POST /api/generate` and follows the job until its images are ready.

Form fields are named as in the API. The API validates them and names invalid ones by JSON pointer; this script checks
no limits. */

const TERMINAL = ["succeeded", "failed", "canceled", "expired"];
const PROMPT_FIELDS = [
  "prompt", "template", "system_prompt", "thinking_content", "assistant_content", "force_think_block", "strip_quotes",
  "clean_whitespace", "long_prompt_mode",
];
const POLL_INTERVAL_MS = 1000;
const COUNT_DELAY_MS = 300;
const MAX_THUMBNAILS = 24;
const KEY = "zimage.key";
const STACKED = matchMedia("(max-width: 800px)"); // the images are below the form

const byId = (id) => document.getElementById(id);
const form = byId("request");
const inputAddresses = {}; // addresses of uploads and of earlier outputs, by request field
let currentJob = null;
let busyCount = 0; // running uploads and jobs; nothing is submitted while it is above 0

/* The API. */

class RequestRefused extends Error {
  constructor(detail, errors = []) {
    super(detail);
    this.errors = errors;
  }
}

/* The server is not available now; a later call may succeed. */
class Unreachable extends Error {}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Unreachable("The server does not answer. Try again in a moment.");
  });
  const content = await response.json().catch(() => ({}));
  const detail = content.detail ?? `The server answered with status ${response.status}.`;
  if (response.status >= 500) throw new Unreachable(detail);
  const keyErrors = response.status === 401 && byId("key") ? [{ pointer: "/key", detail }] : [];
  if (!response.ok) throw new RequestRefused(detail, content.errors ?? keyErrors);
  return content;
}

function post(path, body, options = {}) {
  const headers = { "content-type": "application/json" };
  return call(path, { method: "POST", body: JSON.stringify(body), headers, ...options });
}

/* A job's URL on the host name of this page, which may differ from the configured public URL. */
const onThisHost = (url) => new URL(url).pathname;

/* The form. */

function requestFrom(includes = () => true) {
  const fields = [...form.elements].filter((field) => field.name && includes(field.name) && !field.closest("[hidden]"));
  const values = fields.map((field) => [field.name, valueOf(field)]).filter(([, value]) => value !== undefined);
  return Object.fromEntries(values);
}

/* Return a field's value; undefined if it is empty. Text in a number field is sent as text: the API refuses it. */
function valueOf(field) {
  if (field.type === "file") return inputAddresses[field.name];
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

function clearErrors() {
  for (const error of form.querySelectorAll(".field-error")) error.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

/* Show an error at its field. Return whether there is such a field and it is visible. */
function showFieldError({ pointer = "", detail }) {
  const field = form.elements.namedItem(pointer.split("/")[1]);
  if (!field || field.closest("[hidden]")) return false;
  const properties = { className: "field-error", id: `${field.id}-error`, textContent: detail };
  const message = Object.assign(document.createElement("p"), properties);
  byId(message.id)?.remove();
  field.closest(".field").append(message);
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", message.id);
  field.closest("details")?.setAttribute("open", "");
  return true;
}

/* Return an error's text after the field, header or parameter that it is about; alone if that is the whole body. */
function withPlace({ pointer = "", name, detail }) {
  const place = name ?? pointer.slice(1);
  return place ? `${place}: ${detail}` : detail;
}

/* Show each error at its field; show errors without a visible field in the status line. */
function showError(error) {
  const errors = error.errors ?? [];
  const unplaced = errors.filter((one) => !showFieldError(one));
  const summary = unplaced.map(withPlace).join("; ");
  showMessage(errors.length ? summary || "Please correct the marked fields." : error.message, { refused: true });
  form.querySelector("[aria-invalid]")?.focus();
}

/* Templates and sizes. */

function optionGroup(label, options) {
  const element = Object.assign(document.createElement("optgroup"), { label });
  element.append(...options);
  return element;
}

const titleOf = (name) => name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");

function fillTemplates({ templates }) {
  const categories = [...new Set(templates.map(({ category }) => category))];
  const groups = categories.map((name) => {
    const members = templates.filter(({ category }) => category === name);
    return optionGroup(titleOf(name || "other"), members.map((one) => new Option(titleOf(one.name), one.name)));
  });
  const chooser = byId("template");
  const chosen = chooser.value;
  chooser.replaceChildren(new Option("None", ""), ...groups);
  chooser.value = chosen;
  const descriptions = new Map(templates.map(({ name, description }) => [name, description]));
  chooser.onchange = () => {
    byId("description").textContent = descriptions.get(chooser.value) ?? "";
  };
}

function fillSizes(sizes) {
  const { presets, ratios, resolutions, default: defaultSize, limits } = sizes;
  const others = ratios.filter(({ ratio }) => !presets.some((preset) => preset.ratio === ratio));
  const labelOf = (name, ratio) => (name === ratio ? ratio : `${ratio} ${name.split("_")[0]}`);
  const ratioOption = ({ name, ratio }) => new Option(labelOf(name, ratio), ratio);
  byId("aspect_ratio").replaceChildren(
    optionGroup("Presets", presets.map(ratioOption)),
    optionGroup("Other ratios", others.map(ratioOption)),
    optionGroup("In pixels", [new Option("Width × height", "")]),
  );
  const allowed = resolutions.filter((side) => side * side <= limits.max_pixels);
  byId("resolution").replaceChildren(...allowed.map((side) => new Option(`${side} × ${side}`, side)));
  byId("resolution").value = Math.round(Math.sqrt(defaultSize.width * defaultSize.height));
  const same = ratios.find(({ width, height }) => width === defaultSize.width && height === defaultSize.height);
  byId("aspect_ratio").value = same?.ratio ?? "";
  showSizeFields();
}

function showSizeFields() {
  const bySideLengths = !byId("aspect_ratio").value;
  for (const field of form.querySelectorAll(".by-side-lengths")) field.hidden = !bySideLengths;
  for (const field of form.querySelectorAll(".by-area")) field.hidden = bySideLengths;
}

async function load() {
  clearErrors();
  if (byId("key") && !sessionStorage.getItem(KEY)) return showMessage("Enter your API key to begin.");
  try {
    const [templates, sizes] = await Promise.all([call("/api/templates"), call("/api/sizes")]);
    fillTemplates(templates);
    fillSizes(sizes);
    showMessage("");
  } catch (error) {
    showError(error);
  }
}

/* The token count. */

let counting = new AbortController();

function scheduleCount() {
  counting.abort();
  counting = new AbortController();
  const { signal } = counting;
  setTimeout(() => signal.aborted || count(signal), COUNT_DELAY_MS);
}

async function count(signal) {
  const request = requestFrom((name) => PROMPT_FIELDS.includes(name));
  if (!request.prompt) return showCount({});
  try {
    showCount(await post("/api/format-prompt", request, { signal }));
  } catch (error) {
    if (!signal.aborted) showCount({}); // errors are shown when the form is submitted
  }
}

function showCount({ tokens, limit, used_tokens: used, long_prompt_mode: mode }) {
  const over = limit != null && tokens > limit;
  const counted = limit == null ? `${tokens} tokens` : `${tokens} of ${limit} tokens`;
  const consequence = used == null ? "would be refused" : `will be shortened (${mode?.replace("_", " ")})`;
  byId("tokens").textContent = tokens == null ? "" : over ? `${counted}: too long, ${consequence}` : counted;
  byId("tokens").classList.toggle("over", over);
}

/* Input images, uploaded as soon as they are chosen. */

async function upload(field) {
  const [file] = field.files;
  if (!file) return;
  clearErrors();
  changeBusy(+1);
  try {
    const headers = { "content-type": file.type || "application/octet-stream" };
    const { id } = await call("/api/inputs", { method: "POST", body: file, headers });
    setInput(field, id, URL.createObjectURL(file));
  } catch (error) {
    removeInput(field);
    showFieldError({ pointer: `/${field.name}`, detail: error.errors?.[0]?.detail ?? error.message });
  } finally {
    changeBusy(-1);
  }
}

function setInput(field, address, imageUrl) {
  inputAddresses[field.name] = address;
  showInput(field, imageUrl);
}

function removeInput(field) {
  delete inputAddresses[field.name];
  field.value = "";
  showInput(field, "");
}

function showInput(field, imageUrl) {
  const [thumbnail, remove] = field.parentElement.querySelectorAll("img, button");
  if (thumbnail.src.startsWith("blob:")) URL.revokeObjectURL(thumbnail.src);
  imageUrl ? thumbnail.setAttribute("src", imageUrl) : thumbnail.removeAttribute("src");
  thumbnail.hidden = remove.hidden = !imageUrl;
  byId("with-image").hidden = !inputAddresses.image;
}

/* The job. */

async function generate(event) {
  event.preventDefault();
  if (busyCount) return;
  clearErrors();
  changeBusy(+1);
  try {
    showMessage("Submitting…");
    showResult(await follow(await post("/api/generate", requestFrom())));
    scrollToImages();
  } catch (error) {
    showError(error);
  } finally {
    byId("cancel").disabled = true;
    byId("progress").hidden = true;
    changeBusy(-1);
  }
}

function changeBusy(change) {
  busyCount += change;
  byId("generate").disabled = busyCount > 0;
}

async function follow(job) {
  currentJob = job;
  byId("cancel").disabled = false;
  scrollToImages();
  while (!TERMINAL.includes(currentJob.status)) {
    showProgress(currentJob, currentJob.status === "queued" ? await workersPresent() : null);
    await new Promise((resolve) => setTimeout(resolve, POLL_INTERVAL_MS));
    currentJob = await poll(currentJob);
  }
  return currentJob;
}

/* Return the job's current state, or the last known one while the server is unreachable. */
async function poll(job) {
  try {
    return await call(onThisHost(job.urls.self));
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    return job;
  }
}

async function cancel() {
  await call(onThisHost(currentJob.urls.cancel), { method: "POST" }).catch(showError);
}

function scrollToImages() {
  if (STACKED.matches) byId("result").scrollIntoView();
}

function showMessage(text, { refused = false } = {}) {
  byId("message").textContent = text;
  byId("status").hidden = !text;
  byId("status").classList.toggle("refused", refused);
  byId("placeholder").hidden = Boolean(text) || byId("images").childElementCount > 0;
}

/* Return the number of workers that are present; null if the server does not say. */
async function workersPresent() {
  try {
    return (await (await fetch("/health/ready")).json()).workers;
  } catch {
    return null;
  }
}

function showProgress(job, workers) {
  const { status, progress, queue_position: position, cancel_requested_at: cancelRequestedAt } = job;
  const bar = byId("progress");
  bar.hidden = false;
  progress ? (bar.value = progress.fraction) : bar.removeAttribute("value");
  if (cancelRequestedAt) showMessage("Canceling…");
  else if (status === "queued" && workers === 0) showMessage("Queued: no worker is running; the job waits for one");
  else if (status === "queued") showMessage(position > 1 ? `Queued: number ${position}` : "Queued: next in the queue");
  else if (progress) showMessage(`${titleOf(progress.phase)}: step ${progress.step} of ${progress.steps}`);
  else showMessage("Running");
}

/* The images. */

function showResult(job) {
  const figures = job.outputs.filter(({ url }) => url).map((output) => figureOf(job, output));
  if (job.status === "succeeded") {
    byId("images").replaceChildren(...figures);
    addToSession(job);
  }
  const messages = {
    failed: `Failed: ${job.error?.message}`,
    canceled: "Canceled.",
    expired: "The images were deleted after their retention time.",
  };
  showMessage(messages[job.status] ?? job.engine?.size_notice ?? "", { refused: job.status === "failed" });
}

function figureOf(job, output) {
  const figure = byId("image-card").content.cloneNode(true).firstElementChild;
  const [image, summary, download] = ["img", ".summary", ".download"].map((selector) => figure.querySelector(selector));
  Object.assign(image, { src: output.url, width: output.width, height: output.height, alt: job.request.prompt });
  summary.textContent = `Seed ${output.seed} · ${output.width} × ${output.height} · ${job.request.steps} steps`;
  Object.assign(download, { href: output.download_url, download: "" });
  figure.querySelector(".reuse-seed").onclick = () => useSeed(output.seed);
  figure.querySelector(".start-from").onclick = () => startFrom(job, output);
  return figure;
}

function useSeed(seed) {
  byId("seed").value = seed;
  byId("seed").focus();
}

function startFrom(job, output) {
  byId("image").value = "";
  setInput(byId("image"), `output:${job.id}/${output.index}`, output.url);
  byId("strength").focus();
}

/* Add the job's thumbnails to the list of this session. A click loads the job again, so that its links are fresh. */
function addToSession(job) {
  const strip = byId("strip");
  if (strip.querySelector(`[data-job="${job.id}"]`)) return;
  for (const output of job.outputs) {
    const thumbnail = byId("thumbnail").content.cloneNode(true).firstElementChild;
    thumbnail.dataset.job = job.id;
    const alt = `${job.request.prompt}, seed ${output.seed}`;
    Object.assign(thumbnail.querySelector("img"), { src: output.url, alt });
    thumbnail.querySelector("button").onclick = () => call(onThisHost(job.urls.self)).then(showResult, showError);
    strip.prepend(thumbnail);
  }
  while (strip.childElementCount > MAX_THUMBNAILS) strip.lastElementChild.remove();
  byId("session").hidden = false;
}

/* Event listeners. */

form.addEventListener("submit", generate);
form.addEventListener("input", scheduleCount);
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
byId("cancel").addEventListener("click", cancel);
byId("aspect_ratio").addEventListener("change", showSizeFields);
for (const field of form.querySelectorAll("input[type=file]")) {
  field.addEventListener("change", () => upload(field));
  field.parentElement.querySelector(".remove").addEventListener("click", () => removeInput(field));
}
byId("strength").addEventListener("input", showStrength);
byId("key")?.addEventListener("change", ({ target }) => {
  sessionStorage.setItem(KEY, target.value.trim());
  load();
});

function showStrength() {
  byId("strength-shown").textContent = Number(byId("strength").value).toFixed(2);
}

if (byId("key")) byId("key").value = sessionStorage.getItem(KEY) ?? "";
showStrength();
scheduleCount();
load();
