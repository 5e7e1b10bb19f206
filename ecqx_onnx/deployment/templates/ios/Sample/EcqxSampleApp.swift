// One screen: does this device compute what was computed when the folder was made, how fast, and what is on a picture?

import PhotosUI
import SwiftUI
import UIKit

@main
struct EcqxSampleApp: App {
    var body: some Scene {
        WindowGroup { ContentView() }
    }
}

/// The model on a queue of its own, and what the screen shows of it.
final class Runner: ObservableObject {
    @Published var lines: [String] = ["loading …"]
    @Published var takesPictures = false
    private let queue = DispatchQueue(label: "ecqx.sample")
    private var model: EcqxModel?

    func check() {
        inBackground {
            let found = try EcqxModel(folder: Bundle.main.resourceURL!.appendingPathComponent("model"))
            self.model = found
            let isImage = found.manifest.preprocessing?.kind == "image" && found.manifest.raw != nil
            DispatchQueue.main.async { self.takesPictures = isImage }
            let checks = found.selfCheck().map { "\($0.ok ? "✓" : "✗") \($0.name): \($0.sentence)" }
            let load = String(format: "%.1f", 1000 * found.loadSeconds)
            let latency = String(format: "%.2f", 1000 * (try found.latency()))
            return checks + ["\(found.manifest.model.bytes) bytes, load \(load) ms, latency \(latency) ms"]
        }
    }

    func predict(_ picture: Data) {
        inBackground {
            guard let image = UIImage(data: picture)?.cgImage, let model = self.model else {
                throw EcqxError(description: "this picture cannot be read")
            }
            let best = try model.predict(model.raw(from: image)).prefix(5)
            return best.map { String(format: "%@  %.1f %%", $0.label, 100 * $0.probability) }
        }
    }

    private func inBackground(_ work: @escaping () throws -> [String]) {
        queue.async {
            let said: [String]
            do {
                said = try work()
            } catch {
                said = ["✗ \(error)"]
            }
            DispatchQueue.main.async { self.lines = said }
        }
    }
}

struct ContentView: View {
    @StateObject private var runner = Runner()
    @State private var chosen: PhotosPickerItem?

    var body: some View {
        ScrollView {
            VStack(alignment: .leading, spacing: 16) {
                if runner.takesPictures {
                    PhotosPicker("Choose a picture", selection: $chosen, matching: .images)
                        .buttonStyle(.borderedProminent)
                }
                ForEach(runner.lines, id: \.self) { line in
                    Text(line)
                }
            }
            .frame(maxWidth: .infinity, alignment: .leading)
            .padding()
        }
        .onAppear { runner.check() }
        .onChange(of: chosen) { item in
            Task {
                if let data = try? await item?.loadTransferable(type: Data.self) { runner.predict(data) }
            }
        }
    }
}
