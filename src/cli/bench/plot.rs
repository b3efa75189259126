//! Latencies as a picture: for each share of all runs the time within which they were done, the slow ones drawn apart (the axis counts nines).

use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;

const SIZE: (u32, u32) = (900, 480);
const COLOURS: [RGBColor; 6] = [
    RGBColor(0xc0, 0x39, 0x2b),
    RGBColor(0x24, 0x71, 0xa3),
    RGBColor(0x1e, 0x84, 0x49),
    RGBColor(0x88, 0x4e, 0xa0),
    RGBColor(0xb9, 0x77, 0x0e),
    RGBColor(0x70, 0x7b, 0x7c),
];

/// What a line is called, and its milliseconds, sorted.
pub type Line<'a> = (&'a str, &'a [f64]);

/// Writes `lines` as an SVG.
pub fn latencies(path: &Path, title: &str, lines: &[Line<'_>]) -> anyhow::Result<()> {
    draw(path, title, lines).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn draw(path: &Path, title: &str, lines: &[Line<'_>]) -> Result<(), Box<dyn std::error::Error>> {
    let most = lines.iter().map(|(_, times)| times.len()).max().unwrap_or(0).max(10);
    let nines = nines(most - 1, most);
    let highest = lines.iter().filter_map(|(_, times)| times.last()).copied().fold(0.1, f64::max);
    let lowest = lines.iter().filter_map(|(_, times)| times.first()).copied().fold(highest, f64::min);
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..nines, (lowest.max(0.01) * 0.8..highest * 1.2).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("share of all runs")
        .y_desc("milliseconds")
        .x_labels(8)
        .x_label_formatter(&|nines| share(*nines))
        .y_label_formatter(&|ms| format!("{ms:.3}").trim_end_matches('0').trim_end_matches('.').to_owned())
        .light_line_style(RGBColor(0xee, 0xee, 0xee))
        .draw()?;
    for ((name, times), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let points = times.iter().enumerate().map(|(n, ms)| (self::nines(n, times.len()), *ms));
        let colour = *colour;
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .border_style(RGBColor(0xcc, 0xcc, 0xcc))
        .background_style(WHITE)
        .draw()?;
    area.present()?;
    Ok(())
}

/// 0.9 of all is one nine, 0.99 two.
fn nines(n: usize, of: usize) -> f64 {
    // Counts of runs are far below what a float holds exactly.
    -(1.0 - (n as f64 + 0.5) / of as f64).log10()
}

fn share(nines: f64) -> String {
    let share = 100.0 * (1.0 - 10f64.powf(-nines));
    let digits = nines.floor().max(1.0) as usize - 1;
    format!("{share:.digits$} %")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_a_point_for_each_run_and_the_axis_counts_nines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        let times: Vec<f64> = (1..=100).map(f64::from).collect();
        latencies(&path, "a <title>", &[("ours", &times), ("theirs", &[0.5])]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        let points = svg.lines().filter(|line| line.contains("<polyline") && line.contains("#C0392B"));
        assert!(points.map(|line| line.matches(',').count()).max().unwrap() >= 100, "{svg}");
        assert!(svg.contains("ours") && svg.contains("theirs") && svg.contains("a &lt;title&gt;"));
        assert_eq!([share(0.0), share(1.0), share(2.0), share(3.0)], ["0 %", "90 %", "99.0 %", "99.90 %"]);
        assert!(latencies(&folder.path().join("no/such"), "", &[]).is_err());
    }
}
