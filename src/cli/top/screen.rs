//! The view as lines and tables, and the terminal that shows them.

use std::time::Duration;

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Wrap};

use super::{Counted, Times, View, Watch};
use crate::cli::output::Table;
use crate::cli::units;

/// How long a key may go unseen.
const KEYS_EVERY: Duration = Duration::from_millis(50);

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    End,
    Look,
    Draw,
}

/// Shows it until a key ends it. The terminal is as it was afterwards, also after a panic (ratatui's hook).
pub async fn run(mut watch: Watch, interval: Duration) -> anyhow::Result<()> {
    let mut terminal = ratatui::try_init()?;
    let result = show(&mut terminal, &mut watch, interval).await;
    ratatui::restore();
    result
}

async fn show(
    terminal: &mut ratatui::DefaultTerminal,
    watch: &mut Watch,
    interval: Duration,
) -> anyhow::Result<()> {
    // Signals that would end it without a word to the terminal.
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut hang_up = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?;
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first look was a moment ago: there is nothing to compare it with yet.
    ticks.tick().await;
    let mut keys = tokio::time::interval(KEYS_EVERY);
    keys.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut view: Option<View> = None;
    terminal.draw(|frame| draw(frame, view.as_ref()))?;
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hang_up.recv() => return Ok(()),
            _ = ticks.tick() => view = Some(watch.look().await?),
            _ = keys.tick() => match wish()? {
                None => continue,
                Some(Wish::End) => return Ok(()),
                Some(Wish::Look) => view = Some(watch.look().await?),
                Some(Wish::Draw) => {}
            },
        }
        terminal.draw(|frame| draw(frame, view.as_ref()))?;
    }
}

/// What has been typed; does not wait.
fn wish() -> std::io::Result<Option<Wish>> {
    let mut wish = None;
    while event::poll(Duration::ZERO)? {
        wish = match event::read()? {
            Event::Key(key) if key.kind == KeyEventKind::Press => match (key.code, key.modifiers) {
                (KeyCode::Char('q') | KeyCode::Esc, _) => return Ok(Some(Wish::End)),
                (KeyCode::Char('c'), KeyModifiers::CONTROL) => return Ok(Some(Wish::End)),
                (KeyCode::Char(' '), _) => Some(Wish::Look),
                _ => wish,
            },
            Event::Resize(..) => wish.or(Some(Wish::Draw)),
            _ => wish,
        };
    }
    Ok(wish)
}

fn draw(frame: &mut Frame<'_>, view: Option<&View>) {
    let [top, rest, bottom] =
        Layout::vertical([Constraint::Length(7), Constraint::Fill(1), Constraint::Length(1)])
            .areas(frame.area());
    let faint = Style::default().add_modifier(Modifier::DIM);
    frame.render_widget(Line::styled("q ends, space looks at once", faint), bottom);
    let Some(view) = view else {
        frame.render_widget(Line::raw("coldspark: looking ..."), top);
        return;
    };
    let head: Vec<Line<'_>> = view.head().into_iter().map(Line::raw).collect();
    frame.render_widget(Paragraph::new(head).wrap(Wrap { trim: false }), top);
    let strong = Style::default().add_modifier(Modifier::BOLD);
    let mut lines = Vec::new();
    for (title, table) in view.tables() {
        lines.push(Line::styled(title, strong));
        lines.extend(table.text().lines().map(|line| Line::raw(line.to_owned())));
        lines.push(Line::raw(""));
    }
    // What does not fit is cut: the busiest are first.
    frame.render_widget(Paragraph::new(lines), rest);
}

impl View {
    /// The lines above the tables.
    pub fn head(&self) -> Vec<String> {
        let states: Vec<String> =
            self.vms.by_state.iter().filter(|state| state.count > 0).map(counted).collect();
        let states = if states.is_empty() { "none".to_owned() } else { states.join(", ") };
        let memory = match (self.memory.available_bytes, self.memory.reserve_bytes) {
            (Some(available), Some(reserve)) => {
                format!("{} available, {} are to stay free", units::bytes(available), units::bytes(reserve))
            }
            _ => "unknown".to_owned(),
        };
        let vms = &self.vms;
        let mut lines = vec![
            format!("coldspark {}, the last {:.1} s", self.version, self.interval_s),
            format!("VMs        {states}; {} stand ready in pools; at most {}", vms.held, vms.limit),
            format!("shells     {} of {}      memory  {memory}", vms.shells, vms.shells_target),
            format!("clones     {}", times(&self.clones, "no clones")),
            format!(
                "deletions  {}      boots  {}",
                times(&self.deletions, "none"),
                times(&self.boots, "none")
            ),
            format!("requests   {}", times(&self.requests, "none")),
        ];
        let mut errors: Vec<String> = self.errors.iter().map(counted).collect();
        if self.identity_failures > 0 {
            errors.push(format!("{} CLONES DID NOT CONFIRM THEIR IDENTITY", self.identity_failures));
        }
        lines.push(format!(
            "errors     {}",
            if errors.is_empty() { "none".to_owned() } else { errors.join(", ") }
        ));
        lines
    }

    /// What there are several of, the busiest first.
    pub fn tables(&self) -> Vec<(&'static str, Table)> {
        let mut tables = Vec::new();
        let rate = |rate: f64| format!("{rate:.1}");
        let ms = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.2}"));
        if !self.snapshots.is_empty() {
            let mut rows: Vec<_> = self.snapshots.iter().collect();
            rows.sort_by(|a, b| b.clones.per_s.total_cmp(&a.clones.per_s));
            let mut table = Table::new(&["SNAPSHOT", "MODE", "CLONES/S", "P50 MS", "P99 MS"]);
            for row in rows {
                let clones = &row.clones;
                table.row([
                    row.name.clone(),
                    row.mode.clone(),
                    rate(clones.per_s),
                    ms(clones.p50_ms),
                    ms(clones.p99_ms),
                ]);
            }
            tables.push(("Snapshots", table));
        }
        if !self.pools.is_empty() {
            let mut rows: Vec<_> = self.pools.iter().collect();
            rows.sort_by(|a, b| b.taken_per_s.total_cmp(&a.taken_per_s));
            let mut table = Table::new(&[
                "POOL",
                "READY",
                "TARGET",
                "IN USE",
                "LIMIT",
                "TAKEN/S",
                "MISSED/S",
                "REFUSED/S",
            ]);
            for row in rows {
                let levels = [row.ready, row.target, row.in_use, row.limit].map(|level| level.to_string());
                let rates = [row.taken_per_s, row.missed_per_s, row.refused_per_s].map(rate);
                table.row([row.name.clone()].into_iter().chain(levels).chain(rates));
            }
            tables.push(("Pools", table));
        }
        if !self.functions.is_empty() {
            let mut rows: Vec<_> = self.functions.iter().collect();
            rows.sort_by(|a, b| b.succeeded_per_s.total_cmp(&a.succeeded_per_s));
            let mut table =
                Table::new(&["FUNCTION", "RUNNING", "QUEUED", "WARM", "OK/S", "FAILED/S", "REFUSED/S"]);
            for row in rows {
                let levels = [row.running, row.queued, row.warm].map(|level| level.to_string());
                let rates = [row.succeeded_per_s, row.failed_per_s, row.refused_per_s].map(rate);
                table.row([row.name.clone()].into_iter().chain(levels).chain(rates));
            }
            tables.push(("Functions", table));
        }
        tables
    }
}

fn counted(counted: &Counted) -> String {
    format!("{} {}", counted.count, counted.name)
}

fn times(times: &Times, none: &str) -> String {
    match (times.p50_ms, times.p99_ms) {
        (Some(p50), Some(p99)) => format!("{:.1}/s, p50 {p50:.2} ms, p99 {p99:.2} ms", times.per_s),
        _ => none.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::{Memory, Pool};
    use super::*;

    #[test]
    fn it_fits_any_terminal() {
        let pool = Pool {
            name: "web".into(),
            ready: 3,
            target: 4,
            in_use: 5,
            limit: 6,
            taken_per_s: 7.0,
            missed_per_s: 0.0,
            refused_per_s: 0.0,
        };
        let view = View {
            pools: vec![pool],
            memory: Memory { available_bytes: Some(3 << 30), reserve_bytes: Some(1 << 30) },
            ..View::default()
        };
        for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| draw(frame, Some(&view))).unwrap();
            terminal.draw(|frame| draw(frame, None)).unwrap();
        }
        let mut terminal = Terminal::new(TestBackend::new(100, 30)).unwrap();
        terminal.draw(|frame| draw(frame, Some(&view))).unwrap();
        let shown = terminal.backend().to_string();
        for words in ["no clones", "POOL", "web", "3 GiB available"] {
            assert!(shown.contains(words), "{words:?} is not in {shown}");
        }
    }
}
