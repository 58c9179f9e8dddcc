// Figures as people read them. Pure functions; missing values become a dash.

export const DASH = "–";
const is = (value) => typeof value === "number" && Number.isFinite(value);

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const count = (value) => (is(value) ? whole.format(value) : DASH);

export function megabytes(mb) {
  if (!is(mb)) return DASH;
  if (mb >= 1048576) return `${(mb / 1048576).toFixed(1)} TB`;
  if (mb >= 1024) return `${(mb / 1024).toFixed(mb >= 102400 ? 0 : 1)} GB`;
  return `${Math.round(mb)} MB`;
}

// "14.2 / 24 GB": both in the unit of the whole.
export function shareOf(part_mb, whole_mb) {
  if (!is(part_mb) || !is(whole_mb)) return DASH;
  if (whole_mb < 1024) return `${Math.round(part_mb)} / ${Math.round(whole_mb)} MB`;
  return `${(part_mb / 1024).toFixed(1)} / ${trim(whole_mb / 1024)} GB`;
}

const trim = (value) => value.toFixed(1).replace(/\.0$/, "");

export function bytes(value) {
  if (!is(value)) return DASH;
  if (value < 1000) return `${value} B`;
  for (const unit of ["kB", "MB", "GB", "TB"]) {
    value /= 1000;
    if (value < 999.5 || unit === "TB") return `${value < 9.95 ? value.toFixed(1) : Math.round(value)} ${unit}`;
  }
}

export function percent(part, all) {
  if (!is(part) || !is(all) || all <= 0) return DASH;
  return `${Math.round((100 * part) / all)} %`;
}

export function lag(ms) {
  if (!is(ms)) return DASH;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60000) return `${(ms / 1000).toFixed(1)} s`;
  return span(ms);
}

// A length of time, coarse: "4 s", "12 min", "3 h 20 min", "5 d".
export function span(ms) {
  if (!is(ms)) return DASH;
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

// A place in a recording: "0:07", "12:31", "1:02:03".
export function place(ms) {
  if (!is(ms)) return "";
  const s = Math.max(0, Math.floor(ms / 1000));
  const two = (value) => String(value).padStart(2, "0");
  const [h, m] = [Math.floor(s / 3600), Math.floor((s % 3600) / 60)];
  return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
}

const clockTime = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const dayTime = new Intl.DateTimeFormat("en-GB", {
  day: "2-digit", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit",
});
export function clock(at_ms) {
  if (!is(at_ms) || Math.abs(at_ms) > 8.64e15) return DASH;
  return (Math.abs(Date.now() - at_ms) < 64800000 ? clockTime : dayTime).format(at_ms);
}

export const plural = (n, one, many) => `${count(n)} ${n === 1 ? one : many ?? `${one}s`}`;
export const words = (name) => String(name ?? "").replaceAll("_", " ");
