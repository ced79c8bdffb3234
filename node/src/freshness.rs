//! May a response be stored, how long is it fresh, and what does a request
//! demand? RFC 9111 sections 3, 4.2 and 5.2, RFC 5861, RFC 9213.
//!
//! Pure: headers and times in, decisions out. Rules where the RFCs leave a choice:
//!
//! - A malformed freshness value (`max-age=soon`, `max-age = 5`, `Expires: 0`)
//!   means stale, not absent; a malformed Age is ignored.
//! - Of a directive given twice the first counts.
//! - `private="field"` and `no-cache="field"` keep those fields from all but
//!   whoever asked for the response ([`withheld`]); a list that is none is the bare
//!   directive.
//! - A response with `Set-Cookie` is stored only if it says `public` or
//!   `s-maxage`, or has a targeted field: a cookie is rarely meant for everybody
//!   (`caching.set_cookie`).
//! - Errors are stored only with explicit freshness or `public`; 404 and 410 also
//!   without, and 405, 414 and 501 with Last-Modified, for [`ERROR_TTL_S`].
//! - A response with more than [`TAGS_MAX`] tags is not stored: each must purge it.
//! - A targeted field is no licence to share an answer to credentials.

mod structured;

use std::time::{Duration, SystemTime};

use http::header::{
    AGE, AUTHORIZATION, CACHE_CONTROL, DATE, EXPIRES, LAST_MODIFIED, PRAGMA, SET_COOKIE, VARY,
};
use http::{HeaderMap, HeaderName};
use httpdate::parse_http_date;
use pingora_slice_cluster::wire::HEAD_BYTES_MAX;

use crate::config::{Caching, DefaultFreshness, Honoured, SetCookie};
use crate::fields::Fields;
use crate::manifest::Freshness;

/// Longest freshness of an error that states none, seconds.
const ERROR_TTL_S: u64 = 10;
/// Tags of an answer that is stored. Each is nine bytes of the manifest, 36 KiB
/// in all, and one look-up for each purge that lands between two hits.
pub const TAGS_MAX: usize = 4096;
const _: () = assert!(TAGS_MAX * 9 <= HEAD_BYTES_MAX / 4);
/// Longest age or lifetime (RFC 9111 section 1.2.2), seconds.
const DELTA_MAX: u64 = 1 << 31;
/// A Last-Modified this much older than Date is a strong validator (RFC 9110
/// section 8.8.2.2), seconds.
const LAST_MODIFIED_STRONG_S: u64 = 60;

/// Days of the week; their first three letters are the short form.
const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

/// The directives of a Cache-Control list: lower-case name, unquoted argument.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directives(Vec<(String, Option<String>)>);

impl Directives {
    /// Reads all lines of `name`; what cannot be read is skipped.
    pub fn read(headers: &impl Fields, name: &HeaderName) -> Directives {
        let mut list = Vec::new();
        for line in headers.lines(name) {
            directives(&String::from_utf8_lossy(line), &mut list);
        }
        Directives(list)
    }

    /// Whether the directive is there, with or without an argument.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(n, _)| n == name)
    }

    /// The first argument of the directive: `None` when it is absent, zero
    /// seconds when it is there but no number.
    pub fn seconds(&self, name: &str) -> Option<u64> {
        let (_, argument) = self.0.iter().find(|(n, _)| n == name)?;
        Some(argument.as_deref().and_then(delta_seconds).unwrap_or(0))
    }

    /// Whether the directive is there for the whole response, not for fields
    /// that it lists.
    fn is_bare(&self, name: &str) -> bool {
        self.named(name).any(|fields| fields.is_none())
    }

    /// The field lists of all directives called `name`; `None` for one without.
    fn named(&self, name: &str) -> impl Iterator<Item = Option<Vec<HeaderName>>> {
        self.0
            .iter()
            .filter(move |(n, _)| n == name)
            .map(|(_, argument)| {
                // A string of a targeted field has its first quote still.
                let list = argument.as_deref()?.trim_start_matches('"');
                let names = list.split(',').map(str::trim).filter(|n| !n.is_empty());
                let names: Option<Vec<_>> = names
                    // Meant as quotes, and no field's.
                    .map(|n| {
                        HeaderName::from_bytes(n.as_bytes())
                            .ok()
                            .filter(|_| !n.contains('\''))
                    })
                    .collect();
                names.filter(|names| !names.is_empty())
            })
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Splits a list at the commas outside quoted strings (RFC 9110 section
/// 5.6.4). A string that does not end is a bad argument.
fn directives(line: &str, into: &mut Vec<(String, Option<String>)>) {
    let mut item = String::new();
    let mut quoted = false;
    let mut escaped = false;
    for c in line.chars().chain([',']) {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ',' if !quoted => {
                let (name, argument) = match item.split_once('=') {
                    // No white space is allowed around '=': the argument is bad.
                    Some((name, _)) if name.ends_with([' ', '\t']) => (name, Some("")),
                    Some((name, argument)) => (name, Some(argument)),
                    None => (item.as_str(), None),
                };
                let name = name.trim_matches([' ', '\t']);
                if !name.is_empty() {
                    into.push((name.to_ascii_lowercase(), argument.map(unquote)));
                }
                item.clear();
                continue;
            }
            _ => {}
        }
        item.push(c);
    }
    if let Some((name, _)) = item.split_once('=') {
        let name = name.trim_matches([' ', '\t']);
        into.push((name.to_ascii_lowercase(), Some(String::new())));
    }
}

fn unquote(argument: &str) -> String {
    let argument = argument.trim_end_matches([' ', '\t']);
    match argument.strip_prefix('"').and_then(|a| a.strip_suffix('"')) {
        Some(inner) => inner.replace('\\', ""),
        None => argument.to_owned(),
    }
}

/// A delta-seconds value (RFC 9111 section 1.2.2): digits and nothing else.
fn delta_seconds(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(text.parse().unwrap_or(DELTA_MAX).min(DELTA_MAX))
}

/// What a request says about caching (RFC 9111 section 5.2.1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demands {
    /// Nothing of this exchange may be stored.
    pub no_store: bool,
    /// Validate before answering from store.
    pub no_cache: bool,
    /// Answer from store or 504.
    pub only_if_cached: bool,
    /// Oldest acceptable age, seconds.
    pub max_age: Option<u64>,
    /// Freshness that must be left, seconds.
    pub min_fresh: Option<u64>,
    /// Staleness that is acceptable, seconds; `u64::MAX` for any.
    pub max_stale: Option<u64>,
    /// It carries credentials.
    pub authorized: bool,
}

impl Demands {
    /// Reads a request's head, as far as the site honours what it says.
    pub fn of(request: &impl Fields, honoured: &Honoured) -> Demands {
        let authorized = request.has(&AUTHORIZATION);
        if !request.has(&CACHE_CONTROL) {
            let pragma = Directives::read(request, &PRAGMA).has("no-cache");
            return Demands {
                no_cache: pragma && honoured.no_cache,
                authorized,
                ..Demands::default()
            };
        }
        let cc = Directives::read(request, &CACHE_CONTROL);
        let max_stale =
            cc.0.iter()
                .find(|(n, _)| n == "max-stale")
                .map(|(_, argument)| match argument {
                    None => u64::MAX,
                    Some(text) => delta_seconds(text).unwrap_or(0),
                });
        Demands {
            no_store: honoured.no_store && cc.has("no-store"),
            no_cache: honoured.no_cache && cc.has("no-cache"),
            only_if_cached: honoured.only_if_cached && cc.has("only-if-cached"),
            max_age: cc.seconds("max-age").filter(|_| honoured.max_age),
            min_fresh: cc.seconds("min-fresh").filter(|_| honoured.min_fresh),
            max_stale: max_stale.filter(|_| honoured.max_stale),
            authorized,
        }
    }

    /// How this request may use a stored response.
    pub fn judge(&self, stored: &Freshness, now_ms: u64) -> Use {
        let age = stored.age(now_ms);
        if stored.no_cache || self.no_cache || self.max_age.is_some_and(|max| age > max || max == 0)
        {
            return Use::Validate;
        }
        let left = stored.lifetime.saturating_sub(age);
        if stored.is_fresh(now_ms) {
            return if left < self.min_fresh.unwrap_or(0) {
                Use::Validate
            } else {
                Use::Fresh
            };
        }
        let staleness = stored.staleness(now_ms);
        if stored.must_revalidate || self.min_fresh.is_some() {
            return Use::Validate;
        }
        if self.max_stale.is_some_and(|max| staleness <= max) {
            return Use::Stale;
        }
        if staleness <= stored.stale_while_revalidate {
            return Use::StaleWhileRevalidating;
        }
        Use::Validate
    }
}

/// See [`Demands::judge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Answer with it.
    Fresh,
    /// Answer with it: the client accepts stale.
    Stale,
    /// Answer with it and validate it meanwhile.
    StaleWhileRevalidating,
    /// Ask the origin first.
    Validate,
}

/// Why a response is not stored; the text goes into `Cache-Status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotStored {
    /// `no-store`.
    NoStore,
    /// `private`.
    Private,
    /// Answer to credentials, without a licence to share.
    Authorized,
    /// `Set-Cookie` without a licence to share.
    SetCookie,
    /// `Vary: *`.
    VaryAny,
    /// A status that is not stored without explicit freshness, or not at all.
    Status,
    /// No freshness and no validator, or `default_freshness: none`.
    NoFreshness,
    /// More tags than a manifest carries: a purge by one of them would miss it.
    Tags,
    /// Beyond `max_object_size`.
    TooLarge,
    /// A range that the origin chose, under a label that the client did not ask
    /// for: it is passed on as it came, and kept for what it is.
    PassedAsPart,
    /// A range that the origin chose and that is not kept: it is too large,
    /// encoded, or begins and ends where no slices do.
    PartDoesNotFit,
}

impl NotStored {
    /// The reason in a word.
    pub fn as_str(self) -> &'static str {
        match self {
            NotStored::NoStore => "no-store",
            NotStored::Private => "private",
            NotStored::Authorized => "authorization",
            NotStored::SetCookie => "set-cookie",
            NotStored::VaryAny => "vary-any",
            NotStored::Status => "status",
            NotStored::NoFreshness => "no-freshness",
            NotStored::Tags => "tags",
            NotStored::TooLarge => "too-large",
            NotStored::PassedAsPart => "part",
            NotStored::PartDoesNotFit => "part-does-not-fit",
        }
    }
}

/// The tags of a response, of `Cache-Tag` and `Surrogate-Key`: between commas and white space.
/// All of them: a purge by any is a promise.
pub fn tags(headers: &HeaderMap) -> Vec<String> {
    let mut tags: Vec<String> = Vec::new();
    // Whatever stands around a tag, a purge names it without.
    let separates = |c: char| c == ',' || c.is_whitespace();
    for name in ["cache-tag", "surrogate-key"] {
        for line in headers.get_all(name) {
            let line = String::from_utf8_lossy(line.as_bytes()).into_owned();
            tags.extend(
                line.split(separates)
                    .filter(|tag| !tag.is_empty())
                    .map(str::to_owned),
            );
        }
    }
    tags.sort();
    tags.dedup();
    tags
}

/// Site policy that the decisions need.
#[derive(Clone, Debug)]
pub struct Policy {
    /// `default_freshness`.
    pub default_freshness: DefaultFreshness,
    /// `cache_ttl`.
    pub cache_ttl: Duration,
    /// `caching`.
    pub caching: Caching,
}

/// Decides whether a response may be stored, and its freshness if so.
///
/// `asked_ms` and `received_ms`: Unix milliseconds when the request left and
/// when the response head arrived. A 206 is judged as the 200 it is part of.
pub fn store(
    policy: &Policy,
    request: &Demands,
    status: u16,
    response: &HeaderMap,
    asked_ms: u64,
    received_ms: u64,
) -> Result<Freshness, NotStored> {
    let cc = Directives::read(response, &CACHE_CONTROL);
    let targeted = targeted(policy, response);
    let rules = targeted.as_ref().unwrap_or(&cc);

    let understood = matches!(
        status,
        200 | 203
            | 204
            | 206
            | 300
            | 301
            | 302
            | 303
            | 307
            | 308
            | 404
            | 405
            | 410
            | 414
            | 451
            | 500
            | 501
            | 502
            | 503
            | 504
    );
    if request.no_store {
        return Err(NotStored::NoStore);
    }
    if rules.has("no-store") && !(rules.has("must-understand") && understood) {
        return Err(NotStored::NoStore);
    }
    if rules.has("must-understand") && !understood {
        return Err(NotStored::Status);
    }
    if rules.is_bare("private") {
        return Err(NotStored::Private);
    }
    let shared_by_word = rules.has("public") || rules.has("s-maxage");
    if request.authorized && !shared_by_word && !rules.has("must-revalidate") {
        return Err(NotStored::Authorized);
    }
    if response.contains_key(SET_COOKIE) && !names(rules, &SET_COOKIE) {
        let shared = shared_by_word || targeted.is_some();
        let meant = match policy.caching.set_cookie {
            SetCookie::Never => false,
            SetCookie::Shared => shared,
            SetCookie::Explicit => shared || rules.has("max-age") || response.contains_key(EXPIRES),
        };
        if !meant {
            return Err(NotStored::SetCookie);
        }
    }
    if vary(response).is_none() {
        return Err(NotStored::VaryAny);
    }
    if tags(response).len() > TAGS_MAX {
        return Err(NotStored::Tags);
    }
    if status < 200 || status == 304 || status == 416 {
        return Err(NotStored::Status);
    }

    let date_ms = http_date_ms(response, DATE).unwrap_or(received_ms);
    let lifetime = match explicit_lifetime(rules, targeted.is_some(), response, date_ms) {
        Some(lifetime) => lifetime,
        None => implicit_lifetime(policy, status, response, rules, date_ms)?,
    };
    Ok(Freshness {
        received_ms,
        initial_age: initial_age(response, date_ms, asked_ms, received_ms),
        lifetime,
        no_cache: rules.is_bare("no-cache")
            || (!response.contains_key(CACHE_CONTROL)
                && targeted.is_none()
                && Directives::read(response, &PRAGMA).has("no-cache")),
        must_revalidate: rules.has("must-revalidate")
            || rules.has("proxy-revalidate")
            || rules.has("s-maxage"),
        stale_while_revalidate: rules
            .seconds("stale-while-revalidate")
            .unwrap_or(policy.caching.stale_while_revalidate.as_secs()),
        stale_if_error: rules
            .seconds("stale-if-error")
            .unwrap_or(policy.caching.stale_if_error.as_secs()),
    })
}

/// The first of the targeted fields (RFC 9213, `CDN-Cache-Control` unless the
/// site says otherwise): rules that replace Cache-Control and Expires; empty or
/// unreadable, one is as if it were not there.
fn targeted(policy: &Policy, response: &HeaderMap) -> Option<Directives> {
    policy.caching.targeted_fields.iter().find_map(|name| {
        let lines: Option<Vec<&str>> = response
            .get_all(name)
            .iter()
            .map(|line| line.to_str().ok())
            .collect();
        structured::dictionary(&lines?.join(", ")).filter(|directives| !directives.is_empty())
    })
}

/// Whether a directive keeps this field from all but the asker.
fn names(rules: &Directives, field: &HeaderName) -> bool {
    ["private", "no-cache"]
        .iter()
        .flat_map(|directive| rules.named(directive))
        .flatten()
        .any(|named| named.contains(field))
}

/// The fields that a response has for whoever asked for it and nobody else:
/// `private="field"` and `no-cache="field"` (RFC 9111 sections 5.2.2.4 and
/// 5.2.2.7). Those of `no-cache` could be had by validation; they are left out
/// of what is stored, as the same section allows.
pub fn withheld(policy: &Policy, response: &HeaderMap) -> Vec<HeaderName> {
    let cc = Directives::read(response, &CACHE_CONTROL);
    let targeted = targeted(policy, response);
    let rules = targeted.as_ref().unwrap_or(&cc);
    let list = ["private", "no-cache"]
        .iter()
        .flat_map(|directive| rules.named(directive));
    let mut list: Vec<HeaderName> = list.flatten().flatten().collect();
    list.retain(|name| response.contains_key(name));
    list
}

/// RFC 9111 section 4.2.1, the parts the origin stated.
fn explicit_lifetime(
    rules: &Directives,
    targeted: bool,
    response: &HeaderMap,
    date_ms: u64,
) -> Option<u64> {
    if let Some(seconds) = rules
        .seconds("s-maxage")
        .or_else(|| rules.seconds("max-age"))
    {
        return Some(seconds);
    }
    if targeted || !response.contains_key(EXPIRES) {
        return None;
    }
    // An invalid date, "0" above all, is in the past (section 5.3); so are two.
    let one = response.get_all(EXPIRES).iter().nth(1).is_none();
    let expires_ms = http_date_ms(response, EXPIRES).filter(|_| one).unwrap_or(0);
    Some((expires_ms.saturating_sub(date_ms) / 1000).min(DELTA_MAX))
}

fn implicit_lifetime(
    policy: &Policy,
    status: u16,
    response: &HeaderMap,
    rules: &Directives,
    date_ms: u64,
) -> Result<u64, NotStored> {
    // RFC 9110 section 15.1: heuristically cacheable.
    let heuristic = matches!(
        status,
        200 | 203 | 204 | 206 | 300 | 301 | 308 | 404 | 405 | 410 | 414 | 501
    );
    if !heuristic && !rules.has("public") {
        // Storable only to be validated each time.
        return if rules.has("no-cache") && status < 500 {
            Ok(0)
        } else {
            Err(NotStored::Status)
        };
    }
    if status >= 400 {
        let meant = rules.has("public") || response.contains_key(LAST_MODIFIED);
        return if meant || matches!(status, 404 | 410) {
            Ok(ERROR_TTL_S.min(policy.cache_ttl.as_secs()))
        } else {
            Err(NotStored::Status)
        };
    }
    let ttl = policy.cache_ttl.as_secs();
    match policy.default_freshness {
        DefaultFreshness::Ttl => Ok(ttl),
        DefaultFreshness::Heuristic => match http_date_ms(response, LAST_MODIFIED) {
            Some(modified_ms) => Ok((date_ms.saturating_sub(modified_ms) / 10_000).min(ttl)),
            None if rules.has("no-cache") => Ok(0),
            None => Err(NotStored::NoFreshness),
        },
        DefaultFreshness::None if rules.has("no-cache") => Ok(0),
        DefaultFreshness::None => Err(NotStored::NoFreshness),
    }
}

/// RFC 9111 section 4.2.3, seconds.
fn initial_age(response: &HeaderMap, date_ms: u64, asked_ms: u64, received_ms: u64) -> u64 {
    let apparent = received_ms.saturating_sub(date_ms) / 1000;
    let delay = received_ms.saturating_sub(asked_ms) / 1000;
    apparent.max(age_value(response) + delay)
}

/// The Age field: the first value of the first line; what is no number is ignored.
fn age_value(response: &HeaderMap) -> u64 {
    response
        .get(AGE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.split(',').next())
        .and_then(|v| delta_seconds(v.trim()))
        .unwrap_or(0)
}

fn http_date_ms(headers: &HeaderMap, name: HeaderName) -> Option<u64> {
    let time = http_date(headers.get(name)?.to_str().ok()?)?;
    Some(
        time.duration_since(SystemTime::UNIX_EPOCH)
            .ok()?
            .as_millis() as u64,
    )
}

/// A date in any of the three forms of RFC 9110 section 5.6.7, whatever its
/// case (RFC 9111 section 4.2), and whichever day of the week it says: the rest
/// of it tells which that is.
pub fn http_date(text: &str) -> Option<SystemTime> {
    let mut in_word = false;
    let cased: String = text
        .chars()
        .map(|c| {
            let first = !in_word;
            in_word = c.is_ascii_alphabetic();
            if first {
                c.to_ascii_uppercase()
            } else {
                c.to_ascii_lowercase()
            }
        })
        .collect();
    // The zone is all capitals.
    let cased = match cased.strip_suffix(" Gmt") {
        Some(rest) => format!("{rest} GMT"),
        None => cased,
    };
    let (day, rest) = cased.split_at(cased.find(|c: char| !c.is_ascii_alphabetic())?);
    let is_long = day.len() > 3;
    let names = DAYS.map(|name| if is_long { name } else { &name[..3] });
    let is_day = names.contains(&day);
    let date = parse_http_date(&cased).ok();
    date.or_else(|| {
        let mut others = names.iter().filter(|_| is_day);
        others.find_map(|name| parse_http_date(&format!("{name}{rest}")).ok())
    })
}

/// The request fields a response varies by, lower-case, sorted, each once;
/// `None` for `*`.
pub fn vary(response: &HeaderMap) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for line in response.get_all(VARY) {
        for name in String::from_utf8_lossy(line.as_bytes()).split(',') {
            match name.trim() {
                "" => {}
                "*" => return None,
                name => names.push(name.to_ascii_lowercase()),
            }
        }
    }
    names.sort();
    names.dedup();
    Some(names)
}

/// Whether a response's Last-Modified names its bytes exactly: it is so long
/// before Date that no second version can have it (RFC 9110 section 8.8.2.2).
pub fn has_strong_date(response: &HeaderMap) -> bool {
    match (
        http_date_ms(response, LAST_MODIFIED),
        http_date_ms(response, DATE),
    ) {
        (Some(modified), Some(date)) => date >= modified + LAST_MODIFIED_STRONG_S * 1000,
        _ => false,
    }
}

/// The time as Unix milliseconds.
pub fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    fn stored(fields: &[(&'static str, &str)]) -> Result<Freshness, NotStored> {
        let policy = Policy {
            default_freshness: DefaultFreshness::Ttl,
            cache_ttl: Duration::from_secs(3600),
            caching: Caching::default(),
        };
        store(
            &policy,
            &Demands::default(),
            200,
            &map(fields),
            1_000_000,
            1_000_000,
        )
    }

    fn lifetime(fields: &[(&'static str, &str)]) -> u64 {
        stored(fields).unwrap().lifetime
    }

    #[test]
    fn the_first_of_the_stated_lifetimes_counts() {
        assert_eq!(lifetime(&[("cache-control", "max-age=5, s-maxage=7")]), 7);
        assert_eq!(lifetime(&[("cache-control", "max-age=5, max-age=9")]), 5);
        assert_eq!(
            lifetime(&[
                ("cache-control", "max-age=5"),
                ("cdn-cache-control", "max-age=8")
            ]),
            8
        );
        assert_eq!(lifetime(&[("cache-control", "max-age=\"5\"")]), 5);
        assert_eq!(lifetime(&[("cache-control", "max-age=soon")]), 0);
        assert_eq!(lifetime(&[("cache-control", "max-age=-1")]), 0);
        assert_eq!(
            lifetime(&[("cache-control", "max-age=99999999999999999999")]),
            DELTA_MAX
        );
        assert_eq!(lifetime(&[("expires", "0")]), 0);
        assert_eq!(
            lifetime(&[
                ("date", "Thu, 01 Jan 1970 00:10:00 GMT"),
                ("expires", "Thu, 01 Jan 1970 00:11:40 GMT")
            ]),
            100
        );
        assert_eq!(lifetime(&[]), 3600);
        assert_eq!(
            lifetime(&[("cache-control", "x=\"no-store, private\", max-age=3")]),
            3
        );
    }

    #[test]
    fn what_is_not_for_everybody_is_not_stored() {
        assert_eq!(
            stored(&[("cache-control", "no-store")]),
            Err(NotStored::NoStore)
        );
        assert_eq!(
            stored(&[("cache-control", "Private")]),
            Err(NotStored::Private)
        );
        assert_eq!(
            stored(&[("cache-control", "private=\"a b\", max-age=3")]),
            Err(NotStored::Private)
        );
        assert!(stored(&[("cache-control", "private=\"x\", max-age=3")]).is_ok());
        assert!(
            stored(&[("cache-control", "no-cache=\"x\", no-cache")])
                .unwrap()
                .no_cache
        );
        assert!(
            !stored(&[("cache-control", "no-cache=\"x, y\"")])
                .unwrap()
                .no_cache
        );
        assert_eq!(
            stored(&[("set-cookie", "a=b"), ("cache-control", "max-age=3")]),
            Err(NotStored::SetCookie)
        );
        assert!(
            stored(&[
                ("set-cookie", "a=b"),
                ("cache-control", "public, max-age=3")
            ])
            .is_ok()
        );
        assert_eq!(stored(&[("vary", "a, *")]), Err(NotStored::VaryAny));
        let policy = Policy {
            default_freshness: DefaultFreshness::Ttl,
            cache_ttl: Duration::from_secs(9),
            caching: Caching::default(),
        };
        let authorized = Demands {
            authorized: true,
            ..Demands::default()
        };
        for (cc, ok) in [
            ("max-age=3", false),
            ("public", true),
            ("s-maxage=3", true),
            ("must-revalidate", true),
        ] {
            let answer = store(
                &policy,
                &authorized,
                200,
                &map(&[("cache-control", cc)]),
                0,
                0,
            );
            assert_eq!(answer.is_ok(), ok, "{cc}");
        }
    }

    #[test]
    fn tags_stand_between_commas_and_white_space() {
        let headers = map(&[
            ("cache-tag", "news,\tsport, home"),
            ("surrogate-key", "a\tb  c,d"),
        ]);
        assert_eq!(
            tags(&headers),
            ["a", "b", "c", "d", "home", "news", "sport"]
        );
    }

    #[test]
    fn a_request_gets_what_it_demands() {
        let freshness = Freshness {
            received_ms: 0,
            lifetime: 100,
            ..stored(&[]).unwrap()
        };
        let demands = |cc: &str| Demands::of(&map(&[("cache-control", cc)]), &Honoured::default());
        let at = |s: u64| s * 1000;
        let freshness = Freshness {
            initial_age: 0,
            ..freshness
        };
        assert_eq!(demands("x").judge(&freshness, at(99)), Use::Fresh);
        assert_eq!(demands("x").judge(&freshness, at(100)), Use::Validate);
        assert_eq!(demands("no-cache").judge(&freshness, at(1)), Use::Validate);
        assert_eq!(
            demands("max-age=10").judge(&freshness, at(11)),
            Use::Validate
        );
        assert_eq!(
            demands("min-fresh=60").judge(&freshness, at(50)),
            Use::Validate
        );
        assert_eq!(demands("max-stale").judge(&freshness, at(500)), Use::Stale);
        assert_eq!(
            demands("max-stale=10").judge(&freshness, at(120)),
            Use::Validate
        );
        let swr = Freshness {
            stale_while_revalidate: 30,
            ..freshness
        };
        assert_eq!(
            demands("x").judge(&swr, at(110)),
            Use::StaleWhileRevalidating
        );
    }
}
